"""What the tests of checkpoints share."""

import torch
from helpers import (
    CASES,
    DTYPES,
    FP32,
    MODES,
    assert_same_bits,
    clones,
    entries,
    new_params,
    parameters,
    take_steps,
)

import fastopt

SHAPES = [(9, 512), (7, 5), (), (0,)]  # the first is large enough for states of 8 bits
SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
#: Every rule in every dtype, and one rule in every mode: (cls, variant, dtype, master, states).
RUNS = [(cls, variant, dtype, "auto", FP32) for cls, variant in CASES for dtype in DTYPES]
RUNS += [(fastopt.AdamW, {}, *mode) for mode in MODES]
#: The rules that have states at all.
STATEFUL = [
    (cls, variant)
    for cls, variant in CASES
    if cls.rule.states_of({**cls([torch.ones(1)]).defaults, **variant})
]


def usable(cls, variant, states):
    """Whether a rule can have its states in a form."""
    return not cls.rule.unfit({**cls([torch.ones(1)]).defaults, **variant}, states)


def make(params, master="auto", states=FP32, cls=fastopt.AdamW, **settings):
    return cls(params, **{**SETTINGS, "master_weights": master, "state_dtype": states, **settings})


def trained(dtype, master="auto", states=FP32, cls=fastopt.AdamW, *, shapes=SHAPES, **settings):
    """Four steps of it."""
    optimizer = make(new_params(shapes, dtype), master, states, cls, **settings)
    take_steps(optimizer, range(4))
    return optimizer


def resumed(make, params, state_dict, **options):
    """A new optimizer of copies of the parameters, with the state dict loaded."""
    optimizer = make(clones(params))
    optimizer.load_state_dict(state_dict, **options)
    return optimizer


@torch.no_grad()
def copy_model(source, target):
    """From one optimizer's parameters to the other's."""
    for value, param in zip(parameters(source), parameters(target), strict=True):
        param.copy_(value)


def masters(optimizer):
    return [master.clone() for master in optimizer.master_params()]


def decoded(optimizer):
    """The rule's states as fp32 numbers."""
    return [
        state[name].float()
        for _, state in sorted(optimizer.torch_state_dict()["state"].items())
        for name in sorted(state.keys() - {"step"})
    ]


def assert_same(found, wanted):
    """Nested dicts and lists, with the same bits in their tensors."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    elif isinstance(wanted, torch.Tensor):
        assert_same_bits([found], [wanted])
    else:
        assert found == wanted


def assert_go_on_alike(found, wanted, steps=(4, 5, 6)):
    """Now and after these steps, with the same bits in parameters, masters and states."""
    assert_same(entries(found), entries(wanted))
    assert_same(masters(found), masters(wanted))
    # The first step may plan anew, and the next ones use that plan.
    for some in (steps[:1], steps[1:]):
        assert_same_bits(take_steps(found, some), take_steps(wanted, some))
        assert_same(entries(found), entries(wanted))
    assert_same(masters(found), masters(wanted))
