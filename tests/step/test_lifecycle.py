"""Whole lives of an optimizer, drawn at random: all backends have the same bits, and a textbook has
the same numbers.

Every action ends with a comparison of the backends bit by bit, and with a model in fp64. The model
takes over the optimizer's numbers after each step, so that a step is held to the rounding errors of
one step and not of a life, and every other action to none. An action that raises changes nothing.

Two things are left out: parameters that overlap, because their order matters
(test_training_loop.py), and NaN and infinite gradients without a scaler, because nothing can be
compared after them (test_bits.py).
"""

import collections
import contextlib
import copy
import itertools
import math
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from helpers import (
    BACKENDS,
    BF16,
    CASES,
    FP16,
    FP32,
    FP64,
    HALVES,
    ISAS,
    STATE_DTYPES,
    Interruption,
    entries,
    interpreted,
    masked_out,
    parameters,
    through_file,
    torch_class,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rules.runs import machine
from textbook import (
    clip_coefs,
    half_ulp,
    is_square,
    param_error,
    state_error,
    states_of,
    textbook_step,
)

import fastopt
from fastopt.checkpoints import scripts
from fastopt.packing import Stored, memory_order, param_of

#: For each dtype of parameters, pairs of master_weights and state_dtype.
PAIRS = {
    FP16: [("auto", FP32), ("fp32", BF16), ("auto", "8bit"), (None, FP32), (None, "8bit")],
    BF16: [
        *itertools.product(("auto", "fp32"), STATE_DTYPES),
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
SHAPES = [(), (0,), (1,), (7,), (5, 3), (3, 0), (2, 3, 4, 2), (2, 257), (8200,)]
SHAPES += [(9, 512), (130, 32)]  # large enough for states of 8 bits
LAYOUTS = ["dense", "transposed", "gaps", "inside"]
GRADS = ["new", "new", "new", "none", "none", "keep", "in place", "zero", "expanded", "negated"]
GRADS += [*LAYOUTS[1:], "other dtype"]
SCALE = 16.0  # what GradScalers multiply by: exact, and without an overflow in fp16
MAX_PARAMS = 6
FILL = 7  # what the memory around parameters holds

count: collections.Counter[str] = collections.Counter()


@dataclass
class Twin:
    """What one parameter and its states should be, in fp64."""

    number: torch.Tensor  # at full precision where there is a master
    master: torch.Tensor  # what `number` was when the last step left the parameter as `left`
    left: torch.Tensor | None  # None where the optimizer cannot know any more
    states: dict[str, torch.Tensor] = field(default_factory=dict)  # by their names in torch
    slack: torch.Tensor | float = 0.0  # how wrong `number` may be after writes from outside
    t: int = 0  # steps that the states have seen
    rounds: bool = False  # the next step keeps the states in another form and rounds them first
    is_left_over: bool = False  # its state has entries that the next step drops

    @classmethod
    def new(cls, param, state):
        """A parameter that was not stepped yet has no states, but for Adagrad's."""
        states = {"sum": in_fp64(state["sum"])} if "sum" in state else {}
        return cls(in_fp64(param), in_fp64(param), param.detach().clone(), states)


def in_fp64(tensor):
    return tensor.detach().to(FP64, copy=True)


def number_of(param, state):
    """What the arithmetic takes for a parameter that was not written since the last step."""
    p = param.detach().contiguous()
    remainder, master = state.get("param_remainder"), state.get("master_param")
    if p.dtype == BF16 and remainder is not None:
        return ((p.view(torch.int16).int() << 16) + remainder).view(FP32).double()
    if p.dtype in HALVES and master is not None:
        stands = param_of(master, p.dtype).view(torch.int16) == p.view(torch.int16)
        return torch.where(stands, master, p.float()).double()
    return in_fp64(p)


def unwritten(param, left):
    """For each element, whether all 256 of its block are what a step has left."""
    order = memory_order(left)
    same = (param.view(torch.int16) == left.view(torch.int16)).permute(order)
    blocks = torch.nn.functional.pad(same.reshape(-1), (0, -same.numel() % 256), value=True)
    blocks = blocks.view(-1, 256).all(1).repeat_interleave(256)[: same.numel()]
    return blocks.view(same.shape).permute(torch.tensor(order).argsort().tolist())


def state_of(name, state):
    """A state in fp64, whatever its form; None where there is none."""
    if (plain := state.get(name)) is not None:
        return in_fp64(plain)
    if (codes := state.get(f"{name}_codes")) is not None:
        packing = "unsigned_codes" if is_square(name) else "codes"
        return Stored(codes, packing, state[f"{name}_scale"]).unpack(FP32).double()
    return None


def lay(values, layout):
    """The same numbers in another layout, and the memory around them."""
    if layout == "transposed":
        dims = list(reversed(range(values.ndim)))
        return values.permute(dims).clone(memory_format=torch.contiguous_format).permute(dims), []
    if layout == "gaps":
        base = values.new_full((*values.shape, 2), FILL)
        return base[..., 0].copy_(values), [base[..., 1]]
    if layout == "inside":
        base = values.new_full((values.numel() + 5,), FILL)
        return base[3:-2].view(values.shape).copy_(values), [base[:3], base[-2:]]
    return values.clone(memory_format=torch.contiguous_format), []


def random(shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FP64) * scale


def bits_of(x):
    """Dtype, shape and bits of a tensor, with all NaNs the same; anything else with its type."""
    if not isinstance(x, torch.Tensor):
        return type(x), x
    tensor = x.detach().resolve_neg().contiguous()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), math.nan, tensor)
        tensor = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    return x.dtype, tensor.shape, tensor.numpy().tobytes()


def seen(x):
    """All of a tensor, dict or list that an action which raises must leave as it is."""
    if isinstance(x, dict):
        return {seen(key): seen(value) for key, value in x.items()}
    if isinstance(x, list):
        return [seen(value) for value in x]
    if not isinstance(x, torch.Tensor):
        return x
    readable = x.layout == torch.strided and (x.untyped_storage().nbytes() or not x.numel())
    return id(x), x._version, bits_of(x) if readable else None


def settings_of(group):
    """The settings of a param group, with the value of a tensor."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def suits(name, c, pair, dtypes):
    """Whether a rule with settings ``c`` takes a pair of master_weights and state_dtype."""
    master, kept = pair
    fp32_only = FP64 in dtypes or c.get("centered") or (name == "adagrad" and kept == "8bit")
    return (kept == FP32 or not fp32_only) and (master != "stochastic" or FP16 not in dtypes)


class Side:
    """The optimizer of one backend, with parameters of its own."""

    def __init__(self):
        self.optimizer = None
        self.around = []  # memory beside its parameters

    @property
    def params(self):
        return parameters(self.optimizer)

    def group_of(self, i):
        return [group for group in self.optimizer.param_groups for _ in group["params"]][i]

    def state(self, i):
        return self.optimizer.state.get(self.params[i], {})

    def snapshot(self):
        """All that an action which raises must leave as it is."""
        things = {
            "parameters": self.params,
            "gradients": [param.grad for param in self.params],
            "states": self.optimizer.state,
            "groups": self.optimizer.param_groups,
        }
        return {what: seen(thing) for what, thing in things.items()}

    def numbers(self):
        """The bits of parameters and states."""
        values = [(*place, bits_of(value)) for *place, value in entries(self.optimizer)]
        return [bits_of(param) for param in self.params], values

    @contextlib.contextmanager
    def raises(self, *errors):
        """The action inside must raise, and must have changed nothing."""
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


def freed(param):
    grad = torch.ones_like(param)
    grad.untyped_storage().resize_(0)
    return grad


#: What makes a step raise: where it is put, for a parameter that has a gradient, and what.
FAULTS = {
    "sparse gradient": ("grad", lambda param: torch.ones_like(param).to_sparse()),
    "freed gradient": ("grad", freed),
    "another shape": ("data", lambda param: param.data.new_zeros((3, *param.shape))),
    "another dtype": ("data", lambda param: param.data.to(FP16 if param.dtype == FP64 else FP64)),
    "expanded": ("data", lambda param: param.data.new_zeros((1,) * param.ndim).expand_as(param)),
    "nan lr": ("lr", math.nan),
    "infinite weight_decay": ("weight_decay", math.inf),
    "nan max_norm": ("max_norm", math.nan),
    "negative clip_value": ("clip_value", -1.0),
    "bad seed": ("seed", -1),
    "bad state_dtype": ("state_dtype", torch.int8),
    "bad master_weights": ("master_weights", "half"),
    "bad state": ("state", lambda state: dict.fromkeys(state, torch.ones(4, 4, 1))),
    "nan as a step": ("state", lambda state: {**state, "step": math.nan}),
    "text as a step": ("state", lambda state: {**state, "step": "three"}),
    "hook": ("hook", None),
    "closure": ("closure", None),
}


@contextlib.contextmanager
def spoiled(side, i, fault):
    """A parameter, its state, its group or its optimizer has a fault for a while."""
    (where, bad), param = FAULTS[fault], side.params[i]
    with pytest.MonkeyPatch.context() as patch:
        if where in ("grad", "data"):
            patch.setattr(param, where, bad(param))
        elif where == "state":
            patch.setitem(side.optimizer.state, param, bad(side.state(i)))
        elif where == "hook":
            patch.setitem(side.optimizer._optimizer_step_pre_hooks, "fails", fail)
        elif where != "closure":
            patch.setitem(side.group_of(i), where, bad)
        yield


def give(param, grad):
    """Assigns a gradient, of another dtype too."""
    param.grad = None
    if grad is not None and getattr(param, "grad_dtype", grad.dtype) != grad.dtype:
        param.grad_dtype = grad.dtype  # from torch 2.13 on
    param.grad = grad


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "torch.save": lambda optimizer: through_file(optimizer, weights_only=False),
}

flags = st.booleans()
one_of = st.sampled_from
specs = st.tuples(one_of(SHAPES), one_of(LAYOUTS))
seeds = st.integers(0, 99)
places = st.integers(0, MAX_PARAMS - 1)
modes = st.integers(0, 9)
grad_kinds = st.lists(one_of(GRADS), min_size=MAX_PARAMS, max_size=MAX_PARAMS)
a_change = st.tuples(one_of([*CHANGES]), st.integers(0, 3))


class Life(RuleBasedStateMachine):
    """One optimizer on each of several backends, and what happens to them."""

    backends = BACKENDS
    largest = 10_000  # elements of a parameter

    def __init__(self):
        super().__init__()
        self.machine = contextlib.ExitStack()

    def teardown(self):
        self.machine.close()

    @initialize(
        case=one_of(CASES),
        dtype=one_of([FP32, FP32, BF16, BF16, FP16, FP64]),
        mode=modes,
        groups=st.lists(st.lists(specs, min_size=1, max_size=3), min_size=1, max_size=2),
        changes=st.lists(a_change, max_size=4),
        tensor_lr=flags,
        auto=flags,
        threads=st.integers(1, 3),
        isa=one_of(ISAS),
    )
    def create(self, case, dtype, mode, groups, changes, tensor_lr, auto, threads, isa):
        count["lives"] += 1
        self.machine.enter_context(machine(isa, threads))
        self.cls, variant = case
        self.name = self.cls.rule.name
        c = self.cls([torch.ones(1)], **variant).defaults
        for key, index in changes:
            c = self.changed(c, key, index)
        c |= self.modes_for(mode, c, [dtype])
        given = {key: value for key, value in c.items() if key != "decoupled_weight_decay"}
        self.sides = []
        for backend in self.backends:
            side = Side()
            backend = "auto" if auto and backend == "cpp" else backend
            given["lr"] = torch.tensor(c["lr"]) if tensor_lr else c["lr"]
            new = [
                {"params": [self.parameter(side, *spec, dtype, i) for i, spec in enumerate(group)]}
                for group in groups
            ]
            side.optimizer = self.cls(new, backend=backend, **given)
            self.sides.append(side)
        c["lr"] = float(given["lr"])
        self.settings = [dict(c) for _ in groups]
        self.twins = [Twin.new(p, self.first.state(i)) for i, p in enumerate(self.first.params)]

    def changed(self, c, key, index):
        """Settings with another value, where they have one; Nesterov's fit few."""
        value = CHANGES[key][index % len(CHANGES[key])]
        fits_nesterov = {"momentum": value, "dampening": not value}.get(key, True)
        return {**c, key: value} if key in c and (fits_nesterov or not c.get("nesterov")) else {**c}

    def modes_for(self, index, c, dtypes):
        """The settings master_weights and state_dtype."""
        fitting = [pair for pair in PAIRS[dtypes[0]] if suits(self.name, c, pair, dtypes)]
        return dict(zip(KEPT, fitting[index % len(fitting)], strict=False))

    def parameter(self, side, shape, layout, dtype, seed):
        shape = shape if math.prod(shape) <= self.largest else (3,)
        data, around = lay(random(shape, seed).to(dtype), layout)
        side.around += around
        return torch.nn.Parameter(data) if seed % 2 else data.requires_grad_()

    @property
    def first(self):
        return self.sides[0]

    @property
    def twins_and_params(self):
        return [*enumerate(zip(self.twins, self.first.params, strict=True))]

    @property
    def group_index(self):
        """For each parameter."""
        groups = self.first.optimizer.param_groups
        return [g for g, group in enumerate(groups) for _ in group["params"]]

    def members(self, g):
        """The indices of a group's parameters."""
        return [i for i, group in enumerate(self.group_index) if group == g]

    def c(self, i):
        """The settings of a parameter."""
        return self.settings[self.group_index[i]]

    def place(self, i):
        return i % len(self.twins)

    def has_master(self, i):
        dtype = self.first.params[i].dtype
        return dtype in HALVES and self.c(i)["master_weights"] in ("auto", "fp32", "split")

    def without_master(self, i):
        """The parameter alone is left; a master that was there may still be used."""
        twin, param = self.twins[i], self.first.params[i]
        twin.number, twin.left = in_fp64(param), None
        twin.slack = half_ulp(param) if param.dtype in HALVES else 0.0

    def settle(self, i):
        """A state dict makes remainders fit what was written."""
        twin = self.twins[i]
        if twin.left is not None:
            twin.master, twin.left = twin.number, self.first.params[i].detach().clone()

    def forget_what_was_left(self, i):
        """A remainder that was replaced, or loaded, belongs to the parameter as it will be."""
        twin = self.twins[i]
        if "param_remainder" in self.first.state(i):
            if twin.left is not None and not torch.equal(twin.number, twin.master):
                twin.slack = half_ulp(self.first.params[i])
            twin.left = None

    # Steps.

    def give_gradients(self, side, kinds, seed, scale=1.0):
        for i, param in enumerate(side.params):
            kind, grad = kinds[i], param.grad
            if self.twins[i].is_left_over and kind in ("none", "keep"):
                # What is left over of a parameter without a gradient goes in whichever step is
                # planned anew, which is not the same on all backends.
                kind = "new"
            if kind == "keep":
                continue
            values = random(param.shape, 100 * seed + i, scale).to(param.dtype)
            takes_writes = grad is not None and grad.is_contiguous() and not grad.is_neg()
            if kind == "in place" and takes_writes:
                grad.copy_(values)
                continue
            if kind == "none":
                values = None
            elif kind == "zero":
                values = torch.zeros_like(values)
            elif kind == "expanded" and values.numel():
                values = values[(slice(1),) * values.ndim].expand(values.shape)
            elif kind == "negated" and self.takes_negated():
                values = torch._neg_view(-values)
            elif kind == "other dtype" and hasattr(param, "grad_dtype"):
                values = values.to(BF16 if param.dtype == FP32 else FP32)
            elif kind in LAYOUTS:
                values, _ = lay(values, kind)
            give(param, values)

    def measures(self):
        return any(c["max_norm"] is not None for c in self.settings)

    def takes_negated(self):
        """Whether all optimizers may take the reference for a parameter.

        The norm of its gradients is then added last, which may round otherwise.
        """
        backends = {side.optimizer.backend for side in self.sides}
        return not self.measures() and backends <= {"auto", "reference"}

    def gradients(self):
        grads = [param.grad for param in self.first.params]
        return [None if grad is None else in_fp64(grad) for grad in grads]

    def made_step(self, grads):
        """Compares with the textbook after a step, whose numbers the model then takes over."""
        count["steps"] += 1
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads if g is not None))
        found = self.first.optimizer.grad_norm
        assert (found is not None) == self.measures()
        # The norm is summed in fp64 and rounded to fp32.
        assert found is None or float(found) == pytest.approx(norm, rel=1e-7)
        coefs = clip_coefs(self.settings, norm)
        for i, (twin, param) in self.twins_and_params:
            state, c, g = self.first.state(i), self.c(i), grads[i]
            if g is None:
                continue
            bound = math.inf if c["clip_value"] is None else c["clip_value"]
            g = ((-g if c["maximize"] else g) * coefs[self.group_index[i]]).clamp(-bound, bound)
            initial = torch.tensor(c.get("initial_accumulator_value", 0.0), dtype=FP64)
            initial = initial.to(BF16 if c["state_dtype"] == BF16 else FP64).item()
            names = states_of(self.name, c)
            start = {
                name: twin.states.get(name, torch.full_like(g, initial))
                for name in names
                if name in twin.states or (self.name, name) != ("sgd", "momentum_buffer")
            }
            twin.t += 1
            assert not self.cls.rule.counts_steps or float(state["step"]) == twin.t
            eps = torch.finfo(FP64 if param.dtype == FP64 else FP32).eps
            wanted = textbook_step(self.name, c, twin.t, twin.number, g, start, eps, twin.slack)
            number = number_of(param, state)
            for key, (x, error) in wanted.items():
                now = state_of(key, state) if key else number
                if key:
                    twin.states[key] = now
                    is_exact = c["state_dtype"] == "8bit" and f"{key}_codes" not in state
                    kept = FP32 if is_exact else c["state_dtype"]
                    error = error + 1.01 * state_error(key, x, kept)
                elif not self.has_master(i):
                    error = error + 1.01 * param_error(x, param.dtype)
                if twin.rounds and key in ("", "momentum_buffer"):
                    # Squares far below a block's largest are rounded by more than they are: the
                    # update cannot be foreseen.
                    error = torch.full_like(x, math.inf)
                elif twin.rounds:
                    # What was rounded before the step, too, at most by as much.
                    error = 3 * error + 2 * state_error(key, start[key], c["state_dtype"])
                bad = ~((now - x).abs() <= error)
                assert not bad.any(), (
                    f"{key or 'parameter'} {i}: {now[bad][0]}, not {x[bad][0]} +- {error[bad][0]}"
                )
            twin.number, twin.slack, twin.rounds, twin.is_left_over = number, 0.0, False, False
            twin.master, twin.left = number, param.detach().clone()

    @rule(kinds=grad_kinds, seed=seeds, scale=one_of([1.0, 0.01, 30.0]), closure=flags)
    def step(self, kinds, seed, scale, closure):
        for side in self.sides:
            if closure:
                side.optimizer.step(lambda side=side: self.give_gradients(side, kinds, seed, scale))
            else:
                self.give_gradients(side, kinds, seed, scale)
                side.optimizer.step()
        self.made_step(self.gradients())

    @rule(
        fault=one_of([*FAULTS]),
        i=places,
        kinds=grad_kinds,
        seed=seeds,
        as_is=flags,
        then=grad_kinds,
    )
    def step_that_raises(self, fault, i, kinds, seed, as_is, then):
        """And the good one after it, while gradients come and go, or with what is there."""
        i = self.place(i)
        if not self.can_fail(fault, i):
            return
        for side in self.sides:
            self.give_gradients(side, [*kinds[:i], "new", *kinds[i + 1 :]], seed)
            with spoiled(side, i, fault), side.raises(RuntimeError, ValueError, HookError):
                side.optimizer.step(*[fail] * (fault == "closure"))
        count["raises"] += 1
        self.step(["keep"] * MAX_PARAMS if as_is else then, seed + 1, 1.0, False)

    def can_fail(self, fault, i):
        param, state = self.first.params[i], self.first.state(i)
        if fault == "bad state":
            return any(
                state_of(name, state) is not None for name in states_of(self.name, self.c(i))
            )
        if fault == "another dtype":  # allowed where the gradient's was set
            with spoiled(self.first, i, fault):
                return getattr(param, "grad_dtype", param.dtype) == param.dtype
        needs = {"sparse gradient": param.ndim > 0, "freed gradient": param.numel() > 0}
        return {**needs, "expanded": param.numel() > 1}.get(fault, True)

    @rule(kinds=grad_kinds, seed=seeds)
    def hook_that_raises_after_the_step(self, kinds, seed):
        for side in self.sides:
            self.give_gradients(side, kinds, seed)
            with side.optimizer.register_step_post_hook(fail), pytest.raises(HookError):
                side.optimizer.step()
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
        scaler=one_of([torch.amp.GradScaler, fastopt.GradScaler]),
        kinds=grad_kinds,
        seed=seeds,
        overflow=one_of([None, None, math.inf, math.nan]),
        i=places,
    )
    def scaled_step(self, scaler, kinds, seed, overflow, i):
        i = self.place(i)
        # Only kinds that can be unscaled in place, which torch refuses to do with fp16.
        kinds = [kind if kind in ("none", *LAYOUTS) else "dense" for kind in kinds]
        kinds[i] = "dense"
        if scaler is not fastopt.GradScaler and any(p.dtype == FP16 for p in self.first.params):
            return
        if not self.first.params[i].numel():
            overflow = None
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
                side.params[i].grad = None
        if overflow is None:
            self.made_step(grads)
        count["skipped"] += overflow is not None

    # What happens between steps.

    @rule(g=places, change=a_change)
    def change_a_setting(self, g, change):
        g %= len(self.settings)
        key = change[0]
        self.settings[g] = self.changed(self.settings[g], *change)
        for side in self.sides:
            groups = side.optimizer.param_groups
            if isinstance(value := groups[g].get(key), torch.Tensor):
                value.fill_(self.settings[g][key])  # as schedulers do; groups may share it
                for c, other in zip(self.settings, groups, strict=True):
                    c[key] = value.item() if other[key] is value else c[key]
            elif key in groups[g]:
                groups[g][key] = self.settings[g][key]

    @rule(g=places, mode=modes)
    def change_the_mode(self, g, mode):
        g %= len(self.settings)
        members, before = self.members(g), self.settings[g]["state_dtype"]
        had_master = [*map(self.has_master, members)]
        dtypes = [self.first.params[i].dtype for i in members] or [FP32]
        modes = self.modes_for(mode, self.settings[g], dtypes)
        for group in (self.settings[g], *(side.optimizer.param_groups[g] for side in self.sides)):
            group.update(modes)
        for i, had in zip(members, had_master, strict=True):
            self.twins[i].rounds |= modes["state_dtype"] not in (FP32, before)
            self.twins[i].is_left_over = True
            if not (had and self.has_master(i)):
                self.without_master(i)

    @rule(
        i=places,
        way=one_of(["copy_", "part", ".data", "a moment", "new data", "moved"]),
        layout=one_of(LAYOUTS),
        seed=seeds,
    )
    @torch.no_grad()
    def write_a_parameter(self, i, way, layout, seed):
        i = self.place(i)
        for side in self.sides:
            param = side.params[i]
            new, kept = random(param.shape, seed).to(param.dtype), param.clone()
            if way in ("new data", "moved"):
                param.data, around = lay(new if way == "new data" else kept, layout)
                side.around += around
            elif way == ".data":
                param.data.copy_(new)
            else:
                part = (slice(2 if way == "part" else None),) * param.ndim
                param[part] = new[part]
                if way == "a moment":  # as in an evaluation of averaged weights
                    param.copy_(kept)
        twin, param, state = self.twins[i], self.first.params[i], self.first.state(i)
        if way in ("new data", "moved") and self.c(i)["state_dtype"] == "8bit":
            twin.rounds = True  # blocks are in the order of memory
        if not self.has_master(i):
            twin.number = in_fp64(param)
        elif "param_remainder" not in state:
            twin.number = number_of(param, state)
        elif twin.left is None:
            self.without_master(i)
        else:
            as_left = unwritten(param.detach(), twin.left)
            twin.number = torch.where(as_left, twin.master, in_fp64(param))

    @rule(dtype=one_of([FP16, BF16, FP32, FP64]), g=places)
    def cast(self, dtype, g):
        """A group, as `model.to(dtype)` does."""
        g %= len(self.settings)
        c = self.settings[g]
        if not suits(self.name, c, (c["master_weights"], c["state_dtype"]), [dtype]):
            return
        for i in self.members(g):
            if self.first.params[i].dtype == dtype:
                continue
            for side in self.sides:
                give(side.params[i], None)
                side.params[i].data = side.params[i].data.to(dtype)
            self.without_master(i)
            self.twins[i].is_left_over = True

    @rule(i=places, way=one_of(["delete", "clear", "replace", "move", "number"]))
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
        for j in range(len(self.twins)) if way == "clear" else [i] * (way == "delete"):
            self.twins[j] = Twin.new(self.first.params[j], {})

    @rule(specs=st.lists(specs, max_size=2), mode=modes, change=a_change)
    @precondition(lambda self: len(self.twins) < MAX_PARAMS - 1)
    def add_param_group(self, specs, mode, change):
        c = self.changed(self.settings[0], *change)
        dtype, n = self.first.params[0].dtype, len(self.twins)
        c |= self.modes_for(mode, c, [dtype])
        for side in self.sides:
            params = [self.parameter(side, *spec, dtype, n + k) for k, spec in enumerate(specs)]
            side.optimizer.add_param_group({"params": params, **c})
        self.settings.append(c)
        for i, param in enumerate(self.first.params[n:], n):
            self.twins.append(Twin.new(param, self.first.state(i)))

    @rule(
        bad=one_of(
            [{"lr": -1.0}, {"max_norm": -1.0}, {"state_dtype": "4bit"}, {"master_weights": "half"}]
        ),
        known=flags,
    )
    def add_a_bad_group(self, bad, known):
        for side in self.sides:
            params = side.params[:1] if known else [torch.ones(2, requires_grad=True)]
            with side.raises(ValueError):
                side.optimizer.add_param_group({"params": params, **({} if known else bad)})
        count["raises"] += 1

    # Into other optimizers.

    @rule(way=one_of([*COPIES]))
    def copy(self, way):
        for side in self.sides:
            for param in side.params:
                if param.grad is not None and param.grad.dtype != param.dtype:
                    param.grad = None  # torch cannot copy it
            side.optimizer, side.around = COPIES[way](side.optimizer), []

    @rule(
        mode=modes,
        another_mode=flags,
        through_torch=flags,
        swapped=flags,
        max_norm=one_of(CHANGES["max_norm"]),
    )
    def resume(self, mode, another_mode, through_torch, swapped, max_norm):
        """A new optimizer for the same parameters, of other settings, loads what this one saved."""
        names = [{*states_of(self.name, self.c(i))} for i in range(len(self.twins))]
        for (_, (twin, param)), used in zip(self.twins_and_params, names, strict=True):
            if twin.states and used - twin.states.keys():
                return  # incomplete: a momentum, say, since the last step only
            if through_torch and (param.dtype == FP16 or twin.states.keys() - used):
                return  # too narrow for squares; and torch casts the codes of what is switched off
        had_master = [*map(self.has_master, range(len(self.twins)))]
        kept_before = [self.c(i)["state_dtype"] for i in range(len(self.twins))]
        saved = [through_file(self.saved(side, through_torch)) for side in self.sides]
        for g, c in enumerate(self.settings):
            dtypes = [self.first.params[i].dtype for i in self.members(g)] or [FP32]
            c |= {"max_norm": max_norm} | (self.modes_for(mode, c, dtypes) if another_mode else {})
        for side, state_dict in zip(self.sides, saved[:: -1 if swapped else 1], strict=True):
            groups = [
                {"params": group["params"], **{k: c[k] for k in scripts(self.cls.rule)}}
                for group, c in zip(side.optimizer.param_groups, self.settings, strict=True)
            ]
            side.optimizer = self.cls(groups, lr=1.0, backend=side.optimizer.backend)
            side.optimizer.load_state_dict(state_dict, lossy=True)
        for i, (twin, param) in self.twins_and_params:
            if through_torch or not (had_master[i] and self.has_master(i)):
                self.without_master(i)
            kept = self.c(i)["state_dtype"]
            exact = not (through_torch or twin.rounds) and kept in (FP32, kept_before[i])
            for name in names[i] & twin.states.keys():
                x, now = twin.states[name], state_of(name, self.first.state(i))
                if through_torch:  # which keeps states in the parameter's dtype
                    x = x.to(param.dtype).double()
                if param.dtype != FP64:  # it may have been
                    x = x.float().double()
                error = torch.zeros_like(x) if exact else 1.01 * state_error(name, x, kept)
                assert ((now - x).abs() <= error).all(), f"{name} of {i} was lost"
                twin.states[name] = now
            twin.rounds = False
            self.settle(i)
            self.forget_what_was_left(i)

    def saved(self, side, through_torch):
        if not through_torch:
            return side.optimizer.state_dict()
        groups = [{"params": group["params"]} for group in side.optimizer.param_groups]
        theirs = torch_class(self.cls)(groups)
        theirs.load_state_dict(side.optimizer.torch_state_dict())
        return theirs.state_dict()

    @rule(what=one_of(["groups", "hook", "shape", "meta"]))
    def load_that_raises(self, what):
        name = next(iter(states_of(self.name, self.settings[0])), None)
        for side in self.sides:
            state_dict, hook = side.optimizer.state_dict(), contextlib.nullcontext()
            state_dict["param_groups"][0]["lr"] = 0.5
            if what == "groups":
                state_dict["param_groups"] *= 2
            elif what == "hook":
                hook = side.optimizer.register_load_state_dict_pre_hook(fail)
            elif name is None:
                return
            else:
                bad = torch.ones(4, 4, 1, device="meta" if what == "meta" else None)
                state_dict["state"][0] = {name: bad}
            with hook, side.raises(RuntimeError, ValueError, HookError):
                side.optimizer.load_state_dict(state_dict)
        for i in range(len(self.twins)):
            self.settle(i)
        count["raises"] += 1

    @rule()
    def look(self):
        """What users read: masters, and states under torch's names."""
        for i in range(len(self.twins)):
            self.settle(i)
        for side in self.sides:
            masters = list(side.optimizer.master_params())
            states = side.optimizer.torch_state_dict()["state"]
            for i, (twin, master) in enumerate(zip(self.twins, masters, strict=True)):
                assert ((master.double() - twin.number).abs() <= twin.slack).all()
                for name in () if twin.rounds else states_of(self.name, self.c(i)):
                    if name in twin.states:
                        # The parameter may have been fp64 before.
                        wanted = twin.states[name].to(states[i][name].dtype)
                        assert torch.equal(states[i][name], wanted)

    @invariant()
    def same_on_all_backends(self):
        count["actions"] += 1
        first = self.first
        for side in self.sides:
            assert all((around == FILL).all() for around in side.around)
            assert [settings_of(group) for group in side.optimizer.param_groups] == self.settings
            assert bits_of(side.optimizer.grad_norm) == bits_of(first.optimizer.grad_norm)
            for i, (param, wanted) in enumerate(zip(side.params, first.params, strict=True)):
                assert bits_of(param) == bits_of(wanted), f"parameter {i} differs between backends"
                state, wanted = side.state(i), first.state(i)
                assert state.keys() == wanted.keys()
                for key in state:
                    # A number, where the parameter has no gradient, may be left as it is.
                    if key == "step" and float(state[key]) == float(wanted[key]):
                        continue
                    assert bits_of(state[key]) == bits_of(wanted[key]), (
                        f"{key} of {i} differs between backends"
                    )


class InterpretedLife(Life):
    backends = ("triton", "cpp")
    largest = 300


# Python ignores what interrupts it while it closes a generator.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    *masked_out,
]


def live(life, lives, actions, **options):
    """Runs so many lives, and says what was in them."""
    count.clear()
    options |= {"deadline": None, "suppress_health_check": list(HealthCheck)}
    life.TestCase.settings = settings(max_examples=lives, stateful_step_count=actions, **options)
    life.TestCase().runTest()
    print(f"\n{life.__name__}: " + ", ".join(f"{n:,} {what}" for what, n in count.items()))


def test_lives():
    live(Life, 80, 20, derandomize=True, database=None)


@interpreted
def test_lives_in_the_interpreter():
    live(InterpretedLife, 4, 10, derandomize=True, database=None)


@pytest.mark.full
def test_thousands_of_lives():
    live(Life, 3000, 40)


@interpreted
@pytest.mark.full
def test_hundreds_of_lives_in_the_interpreter():
    live(InterpretedLife, 200, 20)
