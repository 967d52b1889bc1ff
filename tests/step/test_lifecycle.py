"""Whole lives of an optimizer, drawn at random: whatever happens around a step, all backends have
the same bits, and a textbook has the same numbers.

After every action the optimizers of a life, one for each backend, are compared with each other bit
by bit, and with a model in fp64 (`textbook.py`). The model takes over the optimizer's numbers after
each step, once they were found right: so that every step is held to the rounding errors of one step
and not of a life, and every other action to none. An action that raises must have changed nothing.

Left out, with the reason: parameters that overlap (their order matters: test_training_loop.py); NaN
and infinite gradients without a scaler (nothing can be compared after them: test_bits.py).
"""

import collections
import contextlib
import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from helpers import BACKENDS, CASES, Interruption, interpreted, torch_class
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from textbook import (
    BF16,
    FP16,
    FP32,
    FP64,
    clip_coefs,
    half_ulp,
    param_error,
    state_error,
    states_of,
    textbook_step,
)

import fastopt
from fastopt.packing import Stored, param_of
from fastopt.step import dispatch

_C = dispatch.extension()
ISAS = _C.supported_isas() if _C else []
#: What Triton's interpreter computes on lanes that are masked out.
MASKED_OUT = [
    f"ignore:{what} encountered:RuntimeWarning"
    for what in ("divide by zero", "invalid value", "overflow")
]

#: For each dtype of parameters, pairs of master_weights and state_dtype.
MODES = {
    FP16: [("auto", FP32), ("fp32", BF16), ("auto", "8bit"), (None, FP32), (None, "8bit")],
    BF16: [
        *(("auto", kept) for kept in (FP32, BF16, "8bit")),
        *(("fp32", kept) for kept in (FP32, BF16, "8bit")),
        *(("stochastic", FP32), ("stochastic", "8bit"), (None, FP32), (None, BF16)),
    ],
    FP32: [("auto", FP32), (None, BF16), ("auto", "8bit")],
    FP64: [("auto", FP32)],
}
#: What state dicts do not change.
KEPT = ("master_weights", "state_dtype", "max_norm", "clip_value")
#: Settings that may change at any time, where the rule has them.
CHANGES = {
    "lr": [0.1, 0.01, 1e-3, 0.0],
    "weight_decay": [0.0, 0.1, 0.01],
    "momentum": [0.0, 0.9, 0.5],
    "dampening": [0.0, 0.1],
    "betas": [(0.9, 0.999), (0.5, 0.9), (0.8, 0.99)],
    "alpha": [0.99, 0.9],
    "eps": [1e-8, 1e-3],
    "lr_decay": [0.0, 0.01],
    "amsgrad": [False, True],
    "maximize": [False, True],
    "max_norm": [None, 0.5, math.inf],
    "clip_value": [None, 0.3],
    "seed": [0, 7],
}
SHAPES = [(), (0,), (1,), (7,), (5, 3), (3, 0), (2, 3, 4, 2), (300,), (2, 257), (8200,)]
LAYOUTS = ["dense", "transposed", "gaps", "inside"]
GRADS = ["new", "new", "new", "none", "none", "keep", "in place", "zero", "expanded", "negated"]
GRADS += [*LAYOUTS[1:], "other dtype"]
SCALE = 16.0  # what GradScalers multiply by: exact, and without an overflow in fp16
MAX_PARAMS = 6

count: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass
class Twin:
    """What one parameter and its states should be, in fp64.

    Args:
        number: the parameter, at full precision where there is a master.
        master: what that was when the last step left the parameter as ``left``.
        left: None where the optimizer cannot know any more.
        states: by their names in torch.
        slack: by how much ``number`` may be wrong, after writes from outside.
        t: steps that the states have seen.
        rounds: the next step keeps the states in another form, and rounds them first.
        is_left_over: its state has entries that the next step drops.
    """

    number: torch.Tensor
    master: torch.Tensor
    left: torch.Tensor | None
    states: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    slack: torch.Tensor | float = 0.0
    t: int = 0
    rounds: bool = False
    is_left_over: bool = False

    @classmethod
    def new(cls, param, state=()):
        """Of a parameter that was not stepped yet; Adagrad's has a state all the same."""
        states = {name: state_of(name, state) for name in state if name == "sum"}
        return cls(in_fp64(param), in_fp64(param), param.detach().clone(), states)


def in_fp64(tensor):
    """A copy."""
    return tensor.detach().to(FP64, copy=True)


def number_of(param, state):
    """What the arithmetic takes for a parameter that was not written since the last step."""
    p = param.detach().contiguous()
    if p.dtype == BF16 and (remainder := state.get("param_remainder")) is not None:
        return ((p.view(torch.int16).int() << 16) + remainder).view(FP32).double()
    if p.dtype in (FP16, BF16) and (master := state.get("master_param")) is not None:
        stands = param_of(master, p.dtype).view(torch.int16) == p.view(torch.int16)
        return torch.where(stands, master, p.float()).double()
    return in_fp64(p)


def unwritten(param, left):
    """For each element, whether all 256 of its block are what a step has left."""
    order = sorted(range(left.ndim), key=left.stride, reverse=True)
    same = (param.view(torch.int16) == left.view(torch.int16)).permute(order)
    blocks = torch.nn.functional.pad(same.reshape(-1), (0, -same.numel() % 256), value=True)
    blocks = blocks.view(-1, 256).all(1).repeat_interleave(256)[: same.numel()]
    return blocks.view(same.shape).permute(torch.tensor(order).argsort().tolist())


def state_of(name, state):
    """A state in fp64, whatever its form; None where there is none."""
    if (plain := state.get(name)) is not None:
        return in_fp64(plain)
    if (codes := state.get(f"{name}_codes")) is not None:
        square = name in ("square_avg", "exp_avg_sq", "max_exp_avg_sq")
        packing = "unsigned_codes" if square else "codes"
        return Stored(codes, packing, state[f"{name}_scale"]).unpack(FP32).double()
    return None


def lay(values, layout):
    """The same numbers in another layout, and the memory around them, which holds 7."""
    if layout == "transposed":
        dims = list(reversed(range(values.ndim)))
        return values.permute(dims).clone(memory_format=torch.contiguous_format).permute(dims), []
    if layout == "gaps":
        base = values.new_full((*values.shape, 2), 7)
        return base[..., 0].copy_(values), [base[..., 1]]
    if layout == "inside":
        base = values.new_full((values.numel() + 5,), 7)
        inside = base[3:-2].view(values.shape).copy_(values)
        return inside, [base[:3], base[-2:]]
    return values.clone(memory_format=torch.contiguous_format), []


def random(shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FP64) * scale


def bits_of(tensor):
    """Dtype, shape and bits of a tensor, all NaNs the same."""
    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), math.nan, tensor)
        tensor = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and bits_of(a) == bits_of(b)
    return type(a) is type(b) and a == b


def settings_of(group):
    """Those of a param group; a tensor's value."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def suits(name, c, mode, dtypes):
    """Whether a rule with settings ``c`` takes pairs of master_weights and state_dtype."""
    master, kept = mode
    if kept != FP32 and (FP64 in dtypes or c.get("centered")):
        return False
    if kept == "8bit" and name == "adagrad":
        return False
    return master != "stochastic" or FP16 not in dtypes


def allowed(c, key, value):
    """Whether a setting may change to a value: Nesterov wants a momentum without dampening."""
    return not c.get("nesterov") or {"momentum": value, "dampening": not value}.get(key, True)


class Side:
    """The optimizer of one backend, with parameters of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.around = []  # memory around its parameters, which holds 7

    @property
    def params(self):
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def group_of(self, i):
        return [group for group in self.optimizer.param_groups for _ in group["params"]][i]

    def state(self, i):
        return self.optimizer.state.get(self.params[i], {})

    def snapshot(self):
        """All that an action which raises must leave as it is."""

        def seen(x):
            if not isinstance(x, torch.Tensor):
                return x
            readable = x.layout == torch.strided and (x.untyped_storage().nbytes() or not x.numel())
            return id(x), x._version, bits_of(x) if readable else None

        return {
            "parameters": [seen(param) for param in self.params],
            "gradients": [seen(param.grad) for param in self.params],
            "states": {
                id(param): {key: seen(value) for key, value in state.items()}
                for param, state in self.optimizer.state.items()
            },
            "groups": [
                {k: [*map(id, v)] if k == "params" else seen(v) for k, v in group.items()}
                for group in self.optimizer.param_groups
            ],
        }

    def numbers(self):
        """The bits of parameters and states."""
        return [
            (bits_of(param), {key: bits_of(torch.as_tensor(x)) for key, x in self.state(i).items()})
            for i, param in enumerate(self.params)
        ]

    @contextlib.contextmanager
    def raises(self, *errors):
        """Where an action raises, having changed nothing."""
        before = self.snapshot()
        with pytest.raises(errors):
            yield
        now = self.snapshot()
        for what in before:
            assert before[what] == now[what], f"an action that raised changed the {what}"


class HookError(Exception):
    """What hooks and closures raise here."""


def fail(*args):
    raise HookError


# What makes a step raise. Each spoils one parameter, which has a gradient, or its group, and
# returns a function that puts it right again.
def spoil_gradient(make):
    def spoil(side, i):
        param, grad = side.params[i], side.params[i].grad
        param.grad = None
        param.grad = make(param)
        return lambda: give(param, grad)

    return spoil


def freed(param):
    grad = torch.ones_like(param)
    grad.untyped_storage().resize_(0)
    return grad


def spoil_data(change):
    def spoil(side, i):
        param, data = side.params[i], side.params[i].data
        param.data = change(data)
        return lambda: setattr(param, "data", data)

    return spoil


def spoil_setting(key, value):
    def spoil(side, i):
        group = side.group_of(i)
        before = group[key]
        group[key] = value
        return lambda: group.__setitem__(key, before)

    return spoil


def spoil_state(change):
    def spoil(side, i):
        param, states = side.params[i], side.optimizer.state
        before = states.get(param)
        states[param] = change(before or {})

        def restore():
            del states[param]
            if before is not None:
                states[param] = before

        return restore

    return spoil


FAULTS = {
    "sparse gradient": spoil_gradient(lambda param: torch.ones_like(param).to_sparse()),
    "freed gradient": spoil_gradient(freed),
    "another shape": spoil_data(lambda data: data.new_zeros((3, *data.shape))),
    "another dtype": spoil_data(lambda data: data.to(FP16 if data.dtype == FP64 else FP64)),
    "expanded": spoil_data(lambda data: data.new_zeros((1,) * data.ndim).expand(data.shape)),
    "nan lr": spoil_setting("lr", math.nan),
    "infinite weight_decay": spoil_setting("weight_decay", math.inf),
    "nan max_norm": spoil_setting("max_norm", math.nan),
    "negative clip_value": spoil_setting("clip_value", -1.0),
    "bad seed": spoil_setting("seed", -1),
    "bad state_dtype": spoil_setting("state_dtype", torch.int8),
    "bad master_weights": spoil_setting("master_weights", "half"),
    "bad state": spoil_state(lambda state: dict.fromkeys(state, torch.ones(4, 4, 1))),
    "nan as a step": spoil_state(lambda state: {**state, "step": math.nan}),
    "text as a step": spoil_state(lambda state: {**state, "step": "three"}),
    "hook": lambda side, i: side.optimizer.register_step_pre_hook(fail).remove,
    "closure": lambda side, i: lambda: None,
}


def give(param, grad):
    """Assigns a gradient, of another dtype too."""
    param.grad = None
    if grad is not None and getattr(param, "grad_dtype", grad.dtype) != grad.dtype:
        param.grad_dtype = grad.dtype  # from torch 2.13 on
    param.grad = grad


def torch_saved(x):
    """What comes back from a file."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": torch_saved,
}

specs = st.tuples(st.sampled_from(SHAPES), st.sampled_from(LAYOUTS))
seeds = st.integers(0, 99)
places = st.integers(0, MAX_PARAMS - 1)
grad_kinds = st.lists(st.sampled_from(GRADS), min_size=MAX_PARAMS, max_size=MAX_PARAMS)
scales = st.sampled_from([1.0, 0.01, 30.0])
a_change = st.tuples(st.sampled_from([*CHANGES]), st.integers(0, 3))


class Life(RuleBasedStateMachine):
    """One optimizer on each of several backends, and what happens to them."""

    backends = BACKENDS
    largest = 10_000  # elements of a parameter

    @initialize(
        case=st.sampled_from(CASES),
        dtype=st.sampled_from([FP32, FP32, BF16, BF16, FP16, FP64]),
        mode=st.integers(0, 9),
        groups=st.lists(st.lists(specs, min_size=1, max_size=3), min_size=1, max_size=2),
        changes=st.lists(a_change, max_size=4),
        tensor_lr=st.booleans(),
        auto=st.booleans(),
        threads=st.integers(1, 3),
        isa=st.sampled_from(ISAS),
    )
    def create(self, case, dtype, mode, groups, changes, tensor_lr, auto, threads, isa):
        count["lives"] += 1
        self.machine = _C.isa(), torch.get_num_threads()
        _C.use_isa(isa)
        torch.set_num_threads(threads)
        self.cls, variant = case
        self.name = self.cls.rule.name
        c = self.cls([torch.ones(1)], **variant).defaults
        for key, index in changes:
            c = self.changed(c, key, index)
        c["master_weights"], c["state_dtype"] = self.mode_for(mode, c, [dtype])
        given = {key: value for key, value in c.items() if key != "decoupled_weight_decay"}
        self.sides = []
        for backend in self.backends:
            side = Side(None)
            given["lr"] = torch.tensor(c["lr"]) if tensor_lr else c["lr"]
            side.optimizer = self.cls(
                [
                    {"params": [self.parameter(side, *spec, dtype, i) for i, spec in enumerate(g)]}
                    for g in groups
                ],
                backend="auto" if auto and backend == "cpp" else backend,
                **given,
            )
            self.sides.append(side)
        c["lr"] = float(torch.tensor(c["lr"])) if tensor_lr else c["lr"]
        self.settings = [dict(c) for _ in groups]
        self.twins = [Twin.new(p, self.first.state(i)) for i, p in enumerate(self.first.params)]

    def teardown(self):
        if hasattr(self, "machine"):
            _C.use_isa(self.machine[0])
            torch.set_num_threads(self.machine[1])

    def changed(self, c, key, index):
        """Settings with another value, where they have one and it is allowed."""
        value = CHANGES[key][index % len(CHANGES[key])]
        return {**c, key: value} if key in c and allowed(c, key, value) else dict(c)

    def mode_for(self, index, c, dtypes):
        """A pair of master_weights and state_dtype."""
        modes = [mode for mode in MODES[dtypes[0]] if suits(self.name, c, mode, dtypes)]
        return modes[index % len(modes)]

    def parameter(self, side, shape, layout, dtype, seed):
        if math.prod(shape) > self.largest:
            shape = (3,)
        data, around = lay(random(shape, seed).to(dtype), layout)
        side.around += around
        return torch.nn.Parameter(data) if seed % 2 else data.requires_grad_()

    @property
    def first(self):
        return self.sides[0]

    @property
    def group_index(self):
        """For each parameter."""
        groups = self.first.optimizer.param_groups
        return [g for g, group in enumerate(groups) for _ in group["params"]]

    def c(self, i):
        """The settings of a parameter."""
        return self.settings[self.group_index[i]]

    def place(self, i):
        return i % len(self.twins)

    def has_master(self, i):
        dtype = self.first.params[i].dtype
        return dtype in (FP16, BF16) and self.c(i)["master_weights"] in ("auto", "fp32", "split")

    # Steps.

    def give_gradients(self, side, kinds, seed, scale=1.0):
        for i, param in enumerate(side.params):
            kind = kinds[i]
            if self.twins[i].is_left_over and kind in ("none", "keep"):
                # Without a gradient, they go in whichever step is planned anew: not the same one
                # on all backends.
                kind = "new"
            grad = param.grad
            values = random(param.shape, 100 * seed + i, scale).to(param.dtype)
            if kind == "keep":
                continue
            if (
                kind == "in place"
                and grad is not None
                and grad.is_contiguous()
                and not grad.is_neg()
            ):
                with torch.no_grad():
                    grad.copy_(values)
                continue
            if kind == "none":
                values = None
            elif kind == "zero":
                values = torch.zeros_like(values)
            elif kind == "expanded" and values.numel():
                values = values[(slice(1),) * values.ndim].expand(values.shape)
            elif kind == "negated" and self.takes_negated:
                values = torch._neg_view(-values)
            elif kind == "other dtype" and hasattr(param, "grad_dtype"):
                values = values.to(BF16 if param.dtype == FP32 else FP32)
            elif kind in LAYOUTS:
                values, _ = lay(values, kind)
            give(param, values)

    @property
    def takes_negated(self):
        """Whether all optimizers may take the reference for a parameter.

        With a norm, that of its gradients is added last, which may round otherwise.
        """
        clips = any(c["max_norm"] is not None for c in self.settings)
        return not clips and all(s.optimizer.backend in ("auto", "reference") for s in self.sides)

    def gradients(self):
        """In fp64."""
        grads = [param.grad for param in self.first.params]
        return [None if grad is None else in_fp64(grad) for grad in grads]

    def made_step(self, grads):
        """Compares with the textbook after a step, whose numbers the model then takes over."""
        count["steps"] += 1
        measured = any(c["max_norm"] is not None for c in self.settings)
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads if g is not None))
        found = self.first.optimizer.grad_norm
        assert (found is not None) == measured
        # The norm is summed in fp64 and rounded to fp32.
        assert found is None or float(found) == pytest.approx(norm, rel=1e-7)
        coefs = clip_coefs(self.settings, norm)
        for i, (twin, param, g) in enumerate(
            zip(self.twins, self.first.params, grads, strict=True)
        ):
            state, c, kept = self.first.state(i), self.c(i), self.c(i)["state_dtype"]
            if g is None:
                continue
            g = (-g if c["maximize"] else g) * coefs[self.group_index[i]]
            if c["clip_value"] is not None:
                g = g.clamp(-c["clip_value"], c["clip_value"])
            names = states_of(self.name, c)
            start = {name: twin.states[name] for name in names if name in twin.states}
            for name in names:
                if name not in start and (self.name, name) != ("sgd", "momentum_buffer"):
                    initial = torch.tensor(c.get("initial_accumulator_value", 0.0), dtype=FP64)
                    initial = initial.to(BF16 if kept == BF16 else FP64)
                    start[name] = torch.full_like(g, initial.item())
            twin.t += 1
            eps = torch.finfo(FP64 if param.dtype == FP64 else FP32).eps
            wanted = textbook_step(self.name, c, twin.t, twin.number, g, start, eps, twin.slack)
            if self.cls.rule.counts_steps:
                assert float(state["step"]) == twin.t
            number = number_of(param, state)
            for key, (x, error) in wanted.items():
                now = state_of(key, state) if key else number
                if key:
                    error = error + 1.01 * state_error(key, x, kept)
                elif not self.has_master(i):
                    error = error + 1.01 * param_error(x, param.dtype)
                if twin.rounds and key:
                    # What was rounded before the step, too, at most by as much.
                    error = 3 * error + 2 * state_error(key, start.get(key, x), kept)
                if twin.rounds and (not key or key == "momentum_buffer"):
                    # Squares far below a block's largest are rounded by more than they are: the
                    # update cannot be foreseen.
                    error = torch.full_like(x, math.inf)
                bad = ~((now - x).abs() <= error)
                assert not bad.any(), (
                    f"{key or 'parameter'} {i}: {now[bad][0]}, not {x[bad][0]} +- {error[bad][0]}"
                )
                if key:
                    twin.states[key] = now
            twin.number, twin.slack, twin.rounds, twin.is_left_over = number, 0.0, False, False
            twin.master, twin.left = number, param.detach().clone()

    @rule(kinds=grad_kinds, seed=seeds, scale=scales, closure=st.booleans())
    def step(self, kinds, seed, scale, closure):
        for side in self.sides:
            if closure:
                side.optimizer.step(lambda side=side: self.give_gradients(side, kinds, seed, scale))
            else:
                self.give_gradients(side, kinds, seed, scale)
                side.optimizer.step()
        self.made_step(self.gradients())

    @rule(
        fault=st.sampled_from([*FAULTS]),
        i=places,
        kinds=grad_kinds,
        seed=seeds,
        as_is=st.booleans(),
        then=grad_kinds,
    )
    def step_that_raises(self, fault, i, kinds, seed, as_is, then):
        """And the good one after it, while gradients come and go, or with what is there."""
        i = self.place(i)
        kinds = [*kinds[:i], "new", *kinds[i + 1 :]]
        if not self.can_fail(fault, i):
            return
        for side in self.sides:
            self.give_gradients(side, kinds, seed)
            restore = FAULTS[fault](side, i)
            with side.raises(RuntimeError, ValueError, HookError):
                side.optimizer.step(*[fail] * (fault == "closure"))
            restore()
        count["raises"] += 1
        self.step(["keep"] * MAX_PARAMS if as_is else then, seed + 1, 1.0, False)

    def can_fail(self, fault, i):
        param, state = self.first.params[i], self.first.state(i)
        if fault == "bad state":
            return any(
                state_of(name, state) is not None for name in states_of(self.name, self.c(i))
            )
        if fault == "another dtype":  # allowed where the gradient's was set
            data = param.data
            param.data = data.to(FP16 if data.dtype == FP64 else FP64)
            follows = getattr(param, "grad_dtype", param.dtype) == param.dtype
            param.data = data
            return follows
        return {
            "sparse gradient": param.ndim > 0,
            "freed gradient": param.numel() > 0,
            "expanded": param.numel() > 1,
        }.get(fault, True)

    @rule(kinds=grad_kinds, seed=seeds)
    def hook_that_raises_after_the_step(self, kinds, seed):
        for side in self.sides:
            self.give_gradients(side, kinds, seed)
            handle = side.optimizer.register_step_post_hook(fail)
            with pytest.raises(HookError):
                side.optimizer.step()
            handle.remove()
        count["raises"] += 1
        self.made_step(self.gradients())

    @rule(root=st.integers(0, 80), kinds=grad_kinds, seed=seeds)
    def interrupted_step(self, root, kinds, seed):
        """By Ctrl-C somewhere in fastopt's Python code: it was made, or nothing has changed."""
        for side in self.sides:
            self.give_gradients(side, kinds, seed)
            before = side.numbers()
            with contextlib.suppress(KeyboardInterrupt), Interruption(root**2) as interruption:
                side.optimizer.step()
            count["interrupted"] += bool(interruption.where)
            if interruption.where and side.numbers() == before:
                side.optimizer.step()
        self.made_step(self.gradients())

    @rule(
        scaler=st.sampled_from([torch.amp.GradScaler, fastopt.GradScaler]),
        kinds=grad_kinds,
        seed=seeds,
        overflow=st.sampled_from([None, None, math.inf, math.nan]),
        i=places,
    )
    def scaled_step(self, scaler, kinds, seed, overflow, i):
        i = self.place(i)
        # Those that can be unscaled where they are. torch refuses to do so with fp16.
        kinds = [kind if kind in ("none", *LAYOUTS) else "dense" for kind in kinds]
        kinds[i] = "dense"
        if not self.first.params[i].numel():
            overflow = None
        if scaler is not fastopt.GradScaler and any(p.dtype == FP16 for p in self.first.params):
            return
        for side in self.sides:
            self.give_gradients(side, kinds, seed)
            if side is self.first:
                grads = self.gradients()
            for param in side.params:
                if param.grad is not None:
                    param.grad *= SCALE
            if overflow is not None:
                side.params[i].grad.view(-1)[-1] = overflow
            before = side.snapshot()
            amp = scaler("cpu", init_scale=SCALE)
            amp.scale(torch.ones(()))
            amp.step(side.optimizer)
            amp.update()
            assert amp.get_scale() == (SCALE if overflow is None else SCALE / 2)
            if overflow is not None:
                now = side.snapshot()
                assert all(before[k] == now[k] for k in ("parameters", "states", "groups"))
        if overflow is None:
            self.made_step(grads)
            return
        count["skipped"] += 1
        for side in self.sides:
            side.params[i].grad = None

    # What happens between steps.

    @rule(g=places, change=a_change)
    def change_a_setting(self, g, change):
        g %= len(self.settings)
        key, index = change
        self.settings[g] = self.changed(self.settings[g], key, index)
        for side in self.sides:
            group = side.optimizer.param_groups[g]
            if isinstance(value := group.get(key), torch.Tensor):
                value.fill_(self.settings[g][key])  # as schedulers do; groups may share it
                for c, other in zip(self.settings, side.optimizer.param_groups, strict=True):
                    c[key] = value.item() if other[key] is value else c[key]
            elif key in group:
                group[key] = self.settings[g][key]

    @rule(g=places, mode=st.integers(0, 9))
    def change_the_mode(self, g, mode):
        g %= len(self.settings)
        members = [i for i, group in enumerate(self.group_index) if group == g]
        before = self.settings[g]["state_dtype"]
        had_master = [self.has_master(i) for i in members]
        dtypes = [self.first.params[i].dtype for i in members] or [FP32]
        master, kept = self.mode_for(mode, self.settings[g], dtypes)
        self.settings[g] |= {"master_weights": master, "state_dtype": kept}
        for side in self.sides:
            side.optimizer.param_groups[g].update(master_weights=master, state_dtype=kept)
        for i, had in zip(members, had_master, strict=True):
            self.twins[i].rounds |= kept not in (FP32, before)
            self.twins[i].is_left_over = True
            if not (had and self.has_master(i)):
                self.without_master(i)

    def without_master(self, i):
        """The parameter alone is left; a master that was there may still be used."""
        twin, param = self.twins[i], self.first.params[i]
        twin.number, twin.left = in_fp64(param), None
        twin.slack = half_ulp(param) if param.dtype in (FP16, BF16) else 0.0

    @rule(
        i=places,
        way=st.sampled_from(["copy_", "part", ".data", "a moment", "new data", "moved"]),
        layout=st.sampled_from(LAYOUTS),
        seed=seeds,
    )
    def write_a_parameter(self, i, way, layout, seed):
        i = self.place(i)
        twin = self.twins[i]
        for side in self.sides:
            param = side.params[i]
            new = random(param.shape, seed).to(param.dtype)
            with torch.no_grad():
                if way == "copy_":
                    param.copy_(new)
                elif way == "part":
                    part = (slice(2),) * param.ndim
                    param[part] = new[part]
                elif way == ".data":
                    param.data.copy_(new)
                elif way == "a moment":  # as in an evaluation of averaged weights
                    kept = param.clone()
                    param.copy_(new)
                    param.copy_(kept)
                else:
                    param.data, around = lay(new if way == "new data" else param.data, layout)
                    side.around += around
        if way in ("new data", "moved") and self.c(i)["state_dtype"] == "8bit":
            twin.rounds = True  # blocks are in the order of memory
        param, state = self.first.params[i], self.first.state(i)
        if not self.has_master(i):
            twin.number = in_fp64(param)
        elif "param_remainder" not in state:
            twin.number = number_of(param, state)
        elif twin.left is None:
            twin.number, twin.slack = in_fp64(param), half_ulp(param)
        else:
            as_left = unwritten(param.detach(), twin.left)
            twin.number = torch.where(as_left, twin.master, in_fp64(param))

    @rule(dtype=st.sampled_from([FP16, BF16, FP32, FP64]), g=places)
    def cast(self, dtype, g):
        """A group, as `model.to(dtype)` does."""
        g %= len(self.settings)
        c = self.settings[g]
        if not suits(self.name, c, (c["master_weights"], c["state_dtype"]), [dtype]):
            return
        members = [i for i, group in enumerate(self.group_index) if group == g]
        members = [i for i in members if self.first.params[i].dtype != dtype]
        for side in self.sides:
            for i in members:
                give(side.params[i], None)
                side.params[i].data = side.params[i].data.to(dtype)
        for i in members:
            self.without_master(i)
            self.twins[i].is_left_over = True

    @rule(i=places, way=st.sampled_from(["delete", "clear", "replace", "move", "number"]))
    def touch_states(self, i, way):
        i = self.place(i)
        for side in self.sides:
            states, param = side.optimizer.state, side.params[i]
            if way == "clear":
                states.clear()
                continue
            if param not in states:
                return
            state = states[param]
            if way == "delete":
                del states[param]
            elif way == "replace":
                state.update({key: torch.as_tensor(x).clone() for key, x in state.items()})
            elif way == "number":  # as in old checkpoints
                state["step"] = int(state.get("step", 5))
            else:
                for key, x in list(state.items()):
                    if key != "step" and x.shape == param.shape and x.dtype != torch.uint8:
                        state[key], _ = lay(x, "transposed")
        if way in ("replace", "move"):
            self.forget_what_was_left(i)
        for j in range(len(self.twins)) if way == "clear" else [i] if way == "delete" else []:
            self.twins[j] = Twin.new(self.first.params[j])

    @rule(specs=st.lists(specs, max_size=2), mode=st.integers(0, 9), change=a_change)
    @precondition(lambda self: len(self.twins) < MAX_PARAMS - 1)
    def add_param_group(self, specs, mode, change):
        c = self.changed(self.settings[0], *change)
        dtype = self.first.params[0].dtype
        c["master_weights"], c["state_dtype"] = self.mode_for(mode, c, [dtype])
        n = len(self.twins)
        for side in self.sides:
            params = [self.parameter(side, *spec, dtype, n + k) for k, spec in enumerate(specs)]
            side.optimizer.add_param_group({"params": params, **c})
        self.settings.append(c)
        for i in range(n, n + len(specs)):
            self.twins.append(Twin.new(self.first.params[i], self.first.state(i)))

    @rule(
        bad=st.sampled_from(
            [{"lr": -1.0}, {"max_norm": -1.0}, {"state_dtype": "4bit"}, {"master_weights": "half"}]
        ),
        known=st.booleans(),
    )
    def add_a_bad_group(self, bad, known):
        for side in self.sides:
            params = side.params[:1] if known else [torch.ones(2, requires_grad=True)]
            with side.raises(ValueError):
                side.optimizer.add_param_group({"params": params, **({} if known else bad)})
        count["raises"] += 1

    # Into other optimizers.

    @rule(way=st.sampled_from([*COPIES]))
    def copy(self, way):
        for side in self.sides:
            for param in side.params:
                if param.grad is not None and param.grad.dtype != param.dtype:
                    param.grad = None  # torch cannot copy it
            side.optimizer, side.around = COPIES[way](side.optimizer), []

    def settle(self, i):
        """A state dict makes remainders fit what was written."""
        twin, param = self.twins[i], self.first.params[i]
        if twin.left is not None:
            twin.master, twin.left = twin.number, param.detach().clone()

    def forget_what_was_left(self, i):
        """A remainder that was replaced, or loaded, belongs to the parameter as it will be."""
        twin, param = self.twins[i], self.first.params[i]
        if "param_remainder" in self.first.state(i):
            if twin.left is not None and not torch.equal(twin.number, twin.master):
                twin.slack = half_ulp(param)
            twin.left = None

    @rule(
        mode=st.integers(0, 9),
        another_mode=st.booleans(),
        through_torch=st.booleans(),
        swapped=st.booleans(),
        max_norm=st.sampled_from(CHANGES["max_norm"]),
    )
    def resume(self, mode, another_mode, through_torch, swapped, max_norm):
        """A new optimizer for the same parameters, of other settings, loads what this one saved."""
        params = self.first.params
        if through_torch and any(param.dtype == FP16 for param in params):
            return  # too narrow for squares
        if any(
            twin.states and not {*states_of(self.name, self.c(i))} <= twin.states.keys()
            for i, twin in enumerate(self.twins)
        ):
            return  # incomplete: a momentum, say, since the last step only
        if through_torch and any(
            twin.states.keys() - states_of(self.name, self.c(i))
            for i, twin in enumerate(self.twins)
        ):
            return  # torch casts the codes of a momentum that is switched off
        old, had_master = self.settings, [self.has_master(i) for i in range(len(params))]
        self.settings = [dict(c) for c in old]
        for g, c in enumerate(self.settings):
            c["max_norm"] = max_norm
            dtypes = [p.dtype for p, h in zip(params, self.group_index, strict=True) if h == g]
            if another_mode:
                c["master_weights"], c["state_dtype"] = self.mode_for(mode, c, dtypes or [FP32])
        saved = [torch_saved(self.saved(side, through_torch)) for side in self.sides]
        if swapped:
            saved.reverse()
        for side, state_dict in zip(self.sides, saved, strict=True):
            groups = [
                {"params": group["params"], **{k: c[k] for k in KEPT}}
                for group, c in zip(side.optimizer.param_groups, self.settings, strict=True)
            ]
            side.optimizer = self.cls(groups, lr=1.0, backend=side.optimizer.backend)
            side.optimizer.load_state_dict(state_dict, lossy=True)
        for i, (twin, param) in enumerate(zip(self.twins, params, strict=True)):
            if through_torch or not (had_master[i] and self.has_master(i)):
                self.without_master(i)
            kept = self.c(i)["state_dtype"]
            exact = not twin.rounds and kept in (FP32, old[self.group_index[i]]["state_dtype"])
            for name in states_of(self.name, self.c(i)):
                if name not in twin.states:
                    continue
                x = twin.states[name]
                now = state_of(name, self.first.state(i))
                error = torch.zeros_like(x)
                if through_torch:  # which keeps states in the parameter's dtype
                    x = x.to(param.dtype).double()
                if param.dtype != FP64:  # it may have been
                    x = x.float().double()
                if through_torch or not exact:
                    error = 1.01 * state_error(name, x, kept)
                assert ((now - x).abs() <= error).all(), f"{name} of {i} was lost"
                twin.states[name] = now
            twin.rounds = False
            self.settle(i)
            self.forget_what_was_left(i)

    def saved(self, side, through_torch):
        optimizer = side.optimizer
        if not through_torch:
            return optimizer.state_dict()
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        theirs = torch_class(self.cls)(groups)
        theirs.load_state_dict(optimizer.torch_state_dict())
        return theirs.state_dict()

    @rule(what=st.sampled_from(["groups", "hook", "shape", "meta"]))
    def load_that_raises(self, what):
        for side in self.sides:
            optimizer = side.optimizer
            state_dict = optimizer.state_dict()
            state_dict["param_groups"][0]["lr"] = 0.5
            handle = None
            if what == "groups":
                state_dict["param_groups"] *= 2
            elif what == "hook":
                handle = optimizer.register_load_state_dict_post_hook(fail)
                handle.remove()
                handle = optimizer.register_load_state_dict_pre_hook(fail)
            else:
                name = next(iter(states_of(self.name, self.settings[0])), None)
                if name is None:
                    return
                meta = torch.ones(4, 4, 1, device="meta" if what == "meta" else None)
                state_dict["state"][0] = {name: meta}
            with side.raises(RuntimeError, ValueError, HookError):
                optimizer.load_state_dict(state_dict)
            if handle:
                handle.remove()
        for i in range(len(self.twins)):
            self.settle(i)
        count["raises"] += 1

    @rule()
    def look(self):
        """What users read: masters, and states under torch's names."""
        for side in self.sides:
            if side is self.first:
                for i in range(len(self.twins)):
                    self.settle(i)
            masters = list(side.optimizer.master_params())
            states = side.optimizer.torch_state_dict()["state"]
            for i, (twin, master) in enumerate(zip(self.twins, masters, strict=True)):
                assert ((master.double() - twin.number).abs() <= twin.slack).all()
                for name in states_of(self.name, self.c(i)):
                    if name in twin.states and not twin.rounds:
                        # The parameter may have been fp64 before.
                        assert torch.equal(
                            states[i][name], twin.states[name].to(states[i][name].dtype)
                        )

    @invariant()
    def same_on_all_backends(self):
        count["actions"] += 1
        first = self.first
        for side in self.sides:
            assert all((around == 7).all() for around in side.around)
            assert [settings_of(group) for group in side.optimizer.param_groups] == self.settings
            assert same(side.optimizer.grad_norm, first.optimizer.grad_norm)
            for i, (param, wanted) in enumerate(zip(side.params, first.params, strict=True)):
                assert same(param, wanted), f"parameter {i} differs between backends"
                state, wanted = side.state(i), first.state(i)
                assert state.keys() == wanted.keys()
                for key in state:
                    # A number, where the parameter has no gradient, may be left as it is.
                    if key == "step" and float(state[key]) == float(wanted[key]):
                        continue
                    assert same(state[key], wanted[key]), f"{key} of {i} differs between backends"


def live(life, lives, actions, **options):
    """Runs so many lives, and says what was in them."""
    count.clear()
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=lives,
            stateful_step_count=actions,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )
    print(f"\n{life.__name__}: " + ", ".join(f"{n:,} {what}" for what, n in count.items()))


class InterpretedLife(Life):
    backends = ("triton", "cpp")
    largest = 300


# Python ignores what interrupts it while it closes a generator.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_lives():
    live(Life, 80, 20, derandomize=True, database=None)


@interpreted
@pytest.mark.filterwarnings(*MASKED_OUT)
def test_lives_in_the_interpreter():
    live(InterpretedLife, 4, 10, derandomize=True, database=None)


@pytest.mark.full
def test_thousands_of_lives():
    live(Life, 3000, 40)


@interpreted
@pytest.mark.full
@pytest.mark.filterwarnings(*MASKED_OUT)
def test_hundreds_of_lives_in_the_interpreter():
    live(InterpretedLife, 200, 20)
