"""The base class of all optimizers: torch's param groups and state, one fused step."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Concatenate, ParamSpec, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import checkpoints, precision, settings
from .dynamo import untraced
from .precision import MasterWeights, StateDtype
from .rule import Rule
from .step import checks, dispatch, shards
from .step.dispatch import BackendName
from .step.params import Place, Undo, new_states, take_back
from .step.plan import Plan
from .step.table import Scaling, Table

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
P = ParamSpec("P")
R = TypeVar("R")


def on_real(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Calls a method on the optimizer itself, where it is called on a wrapper, and untraced."""

    @functools.wraps(method)
    def call(self: Optimizer, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self._real, *args, **kwargs)

    return untraced(call)


class Extra(TypedDict, total=False):
    """Settings that all optimizers have and take by keyword, unlike some of torch's classes."""

    fused: bool | None
    max_norm: float | None
    clip_value: float | None
    master_weights: MasterWeights
    state_dtype: StateDtype
    seed: int
    norm_group: Any
    numbering: Iterable[Tensor] | None
    backend: BackendName


class CommonButForeach(Extra, total=False):
    maximize: bool
    capturable: bool
    differentiable: bool


class Common(CommonButForeach, total=False):
    """The settings that all optimizers have: see `Optimizer`."""

    foreach: bool | None


class Shared:
    """What an optimizer and a wrapper of it have in common, whoever sets it.

    Attributes:
        optimizer: a weak reference to the optimizer itself.
        grad_norm: see `Optimizer`.
        grad_scale, found_inf, findings: see `Scaling`; None: not given.
        scaled: whether a `fastopt.GradScaler` makes the step.
        in_backward: the handle of `step_in_backward`, while that is at work.
    """

    __slots__ = (
        *("findings", "found_inf", "grad_norm", "grad_scale"),
        *("in_backward", "optimizer", "scaled"),
    )

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.grad_norm: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | float | None = None
        self.findings: dict[torch.device, Tensor] | None = None
        self.scaled = False
        self.in_backward: Any = None

    @property
    def scaling(self) -> Scaling:
        if self.grad_scale is None and self.found_inf is None and self.findings is None:
            return _UNSCALED
        return Scaling(self.grad_scale, self.found_inf, self.findings)


_UNSCALED = Scaling()


def _given(name: str) -> Any:
    """An attribute that a scaler gives the optimizer for the time of a step."""

    def get(self: Optimizer) -> Any:
        value = getattr(self.shared, name)
        if value is None:
            raise AttributeError(f"there is no {name!r} outside of a scaled step")
        return value

    def give(self: Optimizer, value: Any) -> None:
        setattr(self.shared, name, value)

    return property(get, give, lambda self: give(self, None))


class Optimizer(torch.optim.Optimizer):
    """What the optimizers have in common; a subclass adds its rule and its settings.

    The arithmetic is in fp32 (fp64 for fp64 parameters), weight decay included. States are torch's
    by name. State dicts go from and to the torch class of the same name.

    Args:
        params: tensors, (name, tensor) pairs or param groups, as in torch. Every setting may differ
            between groups, except ``norm_group``, ``numbering`` and ``backend``.
        lr, ...: the rule's own settings.
        maximize (default False): step up the gradient instead of down.
        foreach (default None): True, False or None, for torch's sake: every step here is fused.
        fused (default None): the same; not True where ``foreach`` is. True, or a ``max_norm``, also
            leaves it to the step to unscale gradients and to skip overflows, under a
            `torch.amp.GradScaler` as under ours; frameworks then do not clip themselves.
        capturable (default False): let the GPU count the steps and compute the scalars, so that a
            step can be part of a CUDA graph. A graph replays settings as they were at the capture,
            except tensors on the GPU: a setting that changes must be one, changed in place. Load
            state dicts before the capture. States then have a ``step`` on the GPU, in any rule.
            Does nothing for parameters on the CPU.
        differentiable (default False): must be False.
        max_norm (default None): clip the gradients by their global 2-norm over all parameters of
            the optimizer, as `torch.nn.utils.clip_grad_norm_` before the step would, but without
            writing to them. `math.inf` only measures; None does neither. A group may have its own
            ``max_norm``, but the norm is always that of all groups. Of DTensors it is the norm over
            all ranks. Plain parameters of which each rank has only some (ZeRO-1:
            `torch.distributed.optim.ZeroRedundancyOptimizer`; FSDP1) need ``norm_group``: without
            it, each ZeRO-1 rank clips by a norm of its own.
        clip_value (default None): clamp every element of the gradients to ±clip_value, after
            ``max_norm``; None: do not.
        master_weights (default 'auto'): how the fp32 value of a 16-bit parameter is kept.
            ``"split"``: an int16 ``param_remainder``, which with the bf16 parameter is the fp32
            master, bit for bit; a parameter that is written from outside wins. ``"fp32"``: a
            ``master_param``, for fp16 too; elements written from outside win. ``"stochastic"``:
            nothing, bf16 parameters are rounded stochastically instead. None: nothing, they are
            rounded to nearest.
            ``"auto"``: ``"split"`` for bf16 and ``"fp32"`` for fp16. Means nothing for fp32 and
            fp64. With a master, bf16 parameters are rounded to nearest, ties away from zero.
        state_dtype (default torch.float32): how the states are kept: `torch.float32` (fp64 for fp64
            parameters); `torch.bfloat16`, rounded stochastically; or ``"8bit"``: codes of one byte,
            ``<state>_codes``, with an fp32 ``<state>_scale`` of shape (dimension 0, blocks of a
            row) for numbers down to a thousandth of the largest of a block. That has 256 elements,
            or the largest power of two that divides a row; where this is less than 32, and in
            tensors of fewer than 4,096 elements, states stay in fp32. Not for Adagrad; a centered
            RMSprop takes fp32 only. What is there in another form is converted by the next step.
            Also as a word: ``"float32"``, ``"bfloat16"``.
        seed (default 0): of stochastic rounding, in 0 .. 2**32 - 1. The random numbers depend on
            it, on the step, on the parameter's place in the optimizer and on nothing else.
        norm_group (default None): the process group over which the norm of plain parameters is
            taken, where each of its ranks has other parameters, or other parts of them. One for the
            whole optimizer. Copies share it; it is not pickled, nor part of state dicts.
        numbering (default None): all parameters of the model, where this optimizer has only some of
            them (ZeRO-1): the place in this list is the one that random numbers depend on, so that
            they are those of an optimizer of the whole list.
        backend (default 'auto'): ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``;
            ``"auto"`` follows the environment variable ``FASTOPT_BACKEND`` where it is set, and
            else takes the fastest for each parameter.

    Attributes:
        grad_norm: the norm of the gradients in the last step, before clipping: 0-dim, fp32 (fp64
            for fp64 parameters), on the first parameter's device; 0 where no parameter had a
            gradient; None where no group has a ``max_norm``. A replay of a CUDA graph writes to
            the tensor that this was at the capture.

    Raises:
        ValueError: a setting is out of range or not finite, or not for this rule, or there is no
            such backend.
        TypeError: a setting is of a wrong type: no number, flag or pair of numbers.
        NotImplementedError: ``differentiable`` is True.
        RuntimeError: the backend does not work here, or ``foreach`` and ``fused`` are both True.
    """

    rule: ClassVar[Rule]
    #: Settings that between them call for every kernel of the rule; the first is the common case.
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    # Lightning and others wrap an optimizer in an object of a class made from its own, which has
    # the optimizer's attributes by `__getattr__`, or copied when it was made. So nothing here has a
    # default on the class, which would hide the optimizer's, and what is set later is in an object
    # that both have.
    grad_scale = _given("grad_scale")
    found_inf = _given("found_inf")

    @untraced
    def __init__(
        self,
        params: Params,
        settings: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        master_weights: MasterWeights = "auto",
        state_dtype: StateDtype = torch.float32,
        seed: int = 0,
        norm_group: Any = None,
        numbering: Iterable[Tensor] | None = None,
        backend: BackendName = "auto",
    ) -> None:
        self.backend = dispatch.resolve(backend, self.rule)
        self.norm_group = norm_group
        self._numbering = None if numbering is None else tuple(numbering)
        self._begin()
        common = {
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "max_norm": max_norm,
            "clip_value": clip_value,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "seed": seed,
        }
        super().__init__(params, settings | common)

    def _begin(self) -> None:
        """Sets what state dicts, copies and pickles leave out."""
        self.shared = Shared(self)
        self._captured: list[Any] = []  # what CUDA graphs use at their replays
        self._plan: Plan | None = None
        self._table: Table | None = None
        self._undo: Undo = []
        self._lock = _new_lock()

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients in the last step, before clipping: see `Optimizer`."""
        return self.shared.grad_norm

    @grad_norm.setter
    def grad_norm(self, norm: Tensor | None) -> None:
        self.shared.grad_norm = norm

    @property
    def _real(self) -> Optimizer:
        """The optimizer, where ``self`` may be a framework's wrapper of it."""
        return self.shared.optimizer() or self

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a `GradScaler` leaves unscaling and skipping to `step`.

        Frameworks then refuse to clip, and do not see that a step was skipped: so only where
        ``max_norm`` or ``fused`` asks for it, or for gradients in fp16, which torch's scaler
        refuses to unscale.
        """
        return (
            self.shared.scaled
            or self.shared.in_backward is not None  # so that `step` can tell the scaler
            or any(
                group["max_norm"] is not None
                or bool(group["fused"])
                or any(param.dtype == torch.float16 for param in group["params"])
                for group in self._real.param_groups
            )
        )

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        sum_of_squares: Tensor | float | None = None,
    ) -> Any:
        """Makes one step: for all parameters that have a gradient.

        Or for none: if it raises, nothing has changed. If a signal interrupts it, it was made or
        not; ``state[p]["step"]`` tells, where steps are counted. (Between Triton's launches, one
        for each combination of dtypes, an interrupt may leave some parameters updated.) Threads
        that step one optimizer wait for each other.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned here.
            sum_of_squares: of all elements of all gradients, where it is known already: one number,
                or a real tensor of one element, on any device. With a ``max_norm``, ``grad_norm``
                is its root, and the gradients are read once instead of twice; else it is ignored.
                It is that of the gradients as they are now, on all ranks, which must all give it:
                scaled, if a `torch.amp.GradScaler` makes the step and has not unscaled them.

        Raises:
            RuntimeError: a parameter, gradient or state cannot be used: sparse, complex, on another
                device, ...; the message names it. Or a `GradScaler` makes the step under
                `step_in_backward`.
            ValueError, TypeError: a setting was changed to what it cannot be, a precision mode
                does not fit a parameter's dtype, or ``sum_of_squares`` is not such a number.
        """
        if self.shared.in_backward and self.shared.scaling is not _UNSCALED:
            raise RuntimeError(
                "a GradScaler cannot make this step: under step_in_backward the gradients were "
                "applied as they came, scaled, before any overflow of the later ones was known; "
                "train in bf16 without a scaler, or remove() the handle of step_in_backward"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if sum_of_squares is not None:
            sum_of_squares = checks.as_sum_of_squares(sum_of_squares)
        with self._lock:
            if self.shared.in_backward is not None:
                self.shared.in_backward.apply_rest()
            # Gone until the step is made: a plan that raised may be stale.
            plan, self._plan = self._plan, None
            self.shared.grad_norm, self._plan = self._step(plan, None, sum_of_squares)
        return loss

    @untraced
    def step_alone(self, places: dict[int, Place], plan: Plan | None) -> Plan | None:
        """Makes a step for one parameter and drops its gradient: see `step_in_backward`.

        A ``max_norm`` is that of this gradient alone.

        Args:
            places: where the parameter stands in the groups, by its numbers in the optimizer.
            plan: what the last call for these ``places`` returned.

        Raises:
            As `step`.
        """
        with self._lock:
            _, plan = self._step(plan, places, None)
            for place in places.values():
                place.param.grad = None
        return plan

    def places(self) -> dict[int, Place]:
        """Where each parameter stands in the groups, by the number that its random numbers go by.

        Raises:
            ValueError: a parameter is not in ``numbering``, or stands twice in the groups.
        """
        numbers = {param: number for number, param in enumerate(self._numbering or ())}
        places: dict[int, Place] = {}
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                place = Place(group, g, i)
                number = len(places) if self._numbering is None else numbers.get(param, -1)
                if number < 0 or number in places:
                    what = "is not in numbering" if number < 0 else "stands twice in the groups"
                    raise ValueError(f"{place} {what}: give numbering= all parameters once")
                places[number] = place
        return places

    def _take_back(self) -> None:
        """Undoes a step that raised. A second interrupt may leave that to the next call."""
        take_back(self._undo)

    def _step(
        self,
        plan: Plan | None,
        places: dict[int, Place] | None,
        sum_of_squares: Tensor | None,
    ) -> tuple[Tensor | None, Plan | None]:
        """The norm, and the plan if it is good for another step."""
        self._take_back()
        try:
            groups, table = self.param_groups, self._table
            some = None if places is None else [place.group_index for place in places.values()]
            if table is None or not table.holds(groups, some):
                table = self._table = Table(self.rule, groups, self.defaults, table)
            scaling = self.shared.scaling
            on_device = table.on_device or scaling.on_device
            norm_group = self.norm_group if places is None else None
            made_for = groups, self.state, table, self.backend, norm_group, on_device
            if plan is None or not plan.holds(*made_for):
                alone = places is not None
                those = self.places() if places is None else places
                plan = Plan(self.rule, *made_for, self._captured, self._undo, those, alone)
            norm = plan.run(scaling, self._undo, sum_of_squares)
            return norm, plan if plan.reusable else None
        except BaseException:
            self._take_back()
            raise

    @staticmethod
    def profile_hook_step(step: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps `step` in, for hooks and profilers; free where a step begins without.

        An `ExecutionTraceObserver` without a profiler misses the step: Python cannot see it.
        """
        hooked = torch.optim.Optimizer.profile_hook_step(step)

        @functools.wraps(step)
        def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            is_watched = (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or torch._C._autograd._profiler_enabled()
                or torch.autograd.profiler._is_profiler_enabled
            )
            return (hooked if is_watched else step)(self, *args, **kwargs)

        return untraced(wrapper)

    @on_real
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a copy of a group; warns of keys that look like a setting's name with a typo.

        Raises:
            ValueError: a setting is out of range.
            TypeError: a setting is of a wrong type.
        """
        if isinstance(param_group, dict):
            settings.check_group(
                self.rule,
                {**self.defaults, **param_group},
                len(self.param_groups),
                self.defaults,
                may_wait=True,
            )
            settings.warn_of_typos(param_group, self.defaults, type(self).__name__)
            param_group = checkpoints.ParamGroup.of(param_group, self.rule)
        with self._lock:
            super().add_param_group(param_group)
            if self.rule.from_the_start:
                self._make_states(len(self.param_groups) - 1)

    def _make_states(self, g: int) -> None:
        """Makes the states of a new group, which is taken back if that fails."""
        group = self.param_groups[g]
        before = dict(self.state)
        try:
            for i, param in enumerate(group["params"]):
                place = Place(group, g, i)
                here = shards.local(param)
                names = self.rule.states_of(group)
                forms = precision.kept(self.rule, group, here, names, place, param)
                shards.piece(param, forms, place)
                if param.is_floating_point() and param not in self.state:
                    made = new_states(self.rule, group, here, {}, forms)
                    self.state[param] = shards.whole_state(param, made.new)
        except BaseException:
            self.param_groups.pop()
            self.state.clear()
            self.state.update(before)
            raise

    @on_real
    def load_state_dict(self, state_dict: dict[str, Any], lossy: bool = False) -> None:
        """Loads a state dict of this class or of the torch class of the same name.

        Unlike torch, which casts states to the parameter's dtype, this keeps their precision, and
        copies them, so that the optimizer shares no memory with ``state_dict``. Settings that torch
        lacks (``max_norm``, ``clip_value``, ``master_weights``, ``state_dtype``, ``seed``, ...)
        stay those of this optimizer's groups (a copy by `copy.deepcopy` or `pickle` has them too).
        What the state dict has in another form is converted: states of torch's names and dtypes are
        rounded to ``state_dtype``; masters are converted by the next step. So the model may be
        loaded before or after this; but before it, where its parameters had 16 bits and have 32
        now.

        NaN and infinite numbers are loaded: a run that diverged has saved them. Entries of a
        parameter's state that no optimizer of torch or fastopt has are yours, and kept.

        Args:
            lossy: convert also masters and 8-bit states to what cannot hold them exactly.

        Raises:
            ValueError: such a conversion would lose something, or the state dict has other groups,
                states of another rule, too few, or impossible values, or a setting out of range;
                nothing was changed. Impossible values of a DTensor raise on the ranks that have
                them, and on no other.
            TypeError: a setting is of a wrong type, or this is no state dict; nothing was changed.
            RuntimeError: a state does not fit its parameter; nothing was changed.
        """
        checkpoints.check_form(state_dict)

        def prepare(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return checkpoints.prepare(
                self.rule, self.param_groups, self.defaults, _known_states(), state_dict
            )

        with self._lock:
            # Registered only now, to run after the user's hooks.
            handle = self.register_load_state_dict_pre_hook(prepare)
            before = self.state, self.param_groups, self._plan
            try:
                self._take_back()
                super().load_state_dict(state_dict)
                checkpoints.convert(self.rule, self.param_groups, self.state, lossy)
            except BaseException:
                self.state, self.param_groups, self._plan = before
                raise
            finally:
                handle.remove()

    @on_real
    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict` as `torch.optim` wants it, where ``state_dtype`` is ``"8bit"``.

        The states are fp32 numbers under torch's names; what belongs to master weights is left out
        (see `master_params`). The other modes' state dicts load into `torch.optim` as they are.
        """
        return checkpoints.for_torch(self.rule, self.param_groups, self.state_dict())

    @on_real
    def master_params(self) -> Iterator[Tensor]:
        """The parameters at full precision, in the order of the groups, for evaluation or export.

        Yields:
            fp32 tensors: the masters of 16-bit parameters, or what those without a master are;
            fp32 and fp64 parameters themselves, detached. Not to be written.

        Raises:
            ValueError: a precision mode does not fit a parameter's dtype.
        """
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                state = shards.local_state(param, self.state.get(param, {}))
                master = precision.master(group, shards.local(param), state, Place(group, g, i))
                yield shards.like(param, master) if shards.is_shard(param) else master

    @on_real
    def state_dict(self) -> dict[str, Any]:
        """As in torch; remainders are 0 where the parameter was written since the last step.

        The groups have the keys that torch's have, so that `torch.distributed.checkpoint` loads
        checkpoints of either into the other: what torch lacks stays the script's.
        """
        with self._lock:
            # Registered only now, to run before the user's hooks.
            handle = self.register_state_dict_post_hook(_without_private, prepend=True)
            try:
                self._take_back()
                return super().state_dict()
            finally:
                handle.remove()

    @on_real
    def __getstate__(self) -> dict[str, Any]:
        norm_group = None if self.norm_group is None else _Group(self.norm_group)
        own = {"backend": self.backend, "norm_group": norm_group, "_numbering": self._numbering}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called after unpickling, deepcopy and load_state_dict.
        super().__setstate__(state)
        norm_group = vars(self).get("norm_group")
        self.norm_group = norm_group.group if isinstance(norm_group, _Group) else norm_group
        self._numbering = vars(self).get("_numbering")  # older pickles have none
        if "shared" not in vars(self):
            self._begin()
        self._plan = self._table = None
        if self.shared.in_backward is not None:
            self.shared.in_backward.plans.clear()
        for g, group in enumerate(self.param_groups):
            if not isinstance(group, checkpoints.ParamGroup):  # of a copy, or a pickle
                self.param_groups[g] = group = checkpoints.ParamGroup.of(group, self.rule)
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        checkpoints.restore(self.rule, self.param_groups, self.state)


class _Group:
    """A process group in a copy of an optimizer: the same one."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with a norm_group cannot be pickled: save its state_dict() instead"
        )


def _without_private(optimizer: Any, state_dict: dict[str, Any]) -> None:
    for group in state_dict["param_groups"]:
        for key in checkpoints.scripts(optimizer.rule):
            group.pop(key, None)
    params = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    for key, state in state_dict["state"].items():
        if not (isinstance(key, int) and 0 <= key < len(params) and isinstance(state, dict)):
            continue  # the user's own
        group, param = params[key]
        kept = {k: v for k, v in state.items() if not precision.is_leaving(group, k)}
        changed = precision.to_save(shards.local(param), shards.local_state(param, kept))
        state_dict["state"][key] = {**kept, **shards.whole_state(param, changed)}


def _known_states() -> set[str]:
    """The names of the states of all rules."""
    classes = (cls for cls in _subclasses(Optimizer) if "rule" in vars(cls))
    return {name for cls in classes for name in cls.rule.states}


def _subclasses(cls: type[Optimizer]) -> Iterator[type[Optimizer]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def _new_lock() -> Any:
    """Lets one thread at a time into an optimizer, and that one again."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free_locks() -> None:
    for lock in _locks:
        lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):  # the thread that holds a lock is not there in a child
    os.register_at_fork(after_in_child=_free_locks)


C = TypeVar("C", bound=type[Optimizer])


def documented(cls: C) -> C:
    """Adds the arguments of `Common` to a class's docstring and signature, which have its own."""
    if cls.__doc__ and Optimizer.__doc__:  # not with python -OO
        summary, own = inspect.cleandoc(cls.__doc__).split("Args:\n")
        _, shared = inspect.cleandoc(Optimizer.__doc__).split("Args:\n")
        common = shared.replace("    lr, ...: the rule's own settings.", own)
        cls.__doc__ = f"{summary}Args:\n{common}"
    signature = inspect.signature(cls.__init__)
    *own_parameters, _ = signature.parameters.values()
    _, _, _, *common_parameters = inspect.signature(Optimizer.__init__).parameters.values()
    parameters = [
        *own_parameters,
        *(each for each in common_parameters if each.name not in signature.parameters),
    ]
    cls.__init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters
    )
    return cls
