"""The optimizers: torch's constructors and state, one fused step."""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import checkpoints, dispatch, precision
from .clip import get_total_norm
from .items import Place, Undo, new_states, take_back
from .plan import Plan
from .rules import RULES, Group, Rule
from .scalars import Rows

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Optimizer(torch.optim.Optimizer):
    """What the optimizers have in common; a subclass adds its rule and its settings.

    The arithmetic is in fp32 (fp64 for fp64 parameters), weight decay included. States are torch's
    by name. State dicts go from and to the torch class of the same name.

    Args:
        params: tensors, (name, tensor) pairs or param groups, as in torch. Every setting may differ
            between groups.
        lr, ...: as in the torch class of the same name; tensors are read at each step.
        maximize: step up the gradient instead of down.
        foreach, fused: accepted for torch's sake; every step here is fused.
        capturable: let the GPU count the steps and compute the scalars, so that a step can be part
            of a CUDA graph, which repeats settings that are numbers, or tensors on the CPU: one
            that changes must be a tensor on the GPU, changed in place. Load state dicts before the
            capture. States then have a ``step`` on the GPU, in any rule. Does nothing for
            parameters on the CPU.
        differentiable: must be False.
        max_norm: clip the gradients by their global 2-norm over all parameters of the optimizer, as
            `torch.nn.utils.clip_grad_norm_` before the step would, but without writing to them.
            `math.inf` only measures; None, the default, does neither. A group may have its own
            ``max_norm``, but the norm is always that of all groups.
        clip_value: clamp every element of the gradients to ±clip_value, after ``max_norm``.
        master_weights: what makes fp32 numbers of 16-bit parameters. ``"split"``: an int16
            ``param_remainder``, which with the bf16 parameter is the fp32 master, bit for bit; a
            parameter that is written from outside wins. ``"fp32"``: a ``master_param``, for fp16
            too; elements written from outside win. ``"stochastic"``: nothing, bf16 parameters are
            rounded stochastically instead. None: nothing, they are rounded to nearest. ``"auto"``:
            ``"split"`` for bf16 and ``"fp32"`` for fp16. Means nothing for fp32 and fp64. With a
            master, bf16 parameters are rounded to nearest, ties away from zero.
        state_dtype: how the states are kept: `torch.float32` (fp64 for fp64 parameters);
            `torch.bfloat16`, rounded stochastically; or ``"8bit"``: codes of one byte,
            ``<state>_codes``, with an fp32 ``<state>_scale`` for each 256 of them, for numbers
            down to a thousandth of the largest of these. Not for Adagrad, and neither of both for a
            centered RMSprop. What is there in another form is converted by the next step.
        seed: of stochastic rounding, in 0 .. 2**32 - 1. The random numbers depend on it, on the
            step, on the parameter's place in the optimizer and on nothing else.
        backend: "auto", "triton", "cpp" or "reference"; "auto" follows the environment variable
            ``FASTOPT_BACKEND`` where it is set, and else takes the fastest for each parameter.

    Attributes:
        grad_norm: the norm of the gradients in the last step, before clipping: 0-dim, fp32 (fp64
            for fp64 parameters); None where no group has a ``max_norm``. A CUDA graph's replay
            writes to the tensor that this was when the step was captured.

    Raises:
        ValueError: a setting is out of range or not finite, or not for this rule, or there is no
            such backend.
        NotImplementedError: ``differentiable`` is True.
        RuntimeError: the backend does not work here.
    """

    rule: ClassVar[Rule]
    #: Settings that between them call for every kernel of the rule; the first is the common case.
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    grad_norm: Tensor | None = None
    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to `step`
    _findings: dict[torch.device, Tensor] | None = None  # see `Scaling`

    def __init__(self, params: Params, defaults: dict[str, Any], backend: str) -> None:
        self.backend = dispatch.resolve(backend)
        self._captured: list[Any] = []  # what CUDA graphs use at their replays
        self._plan: Plan | None = None
        self._lock = _new_lock()
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step: for all parameters that have a gradient, or none where it raises.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned here.

        Raises:
            RuntimeError: a parameter, gradient or state cannot be used: sparse, complex, on another
                device, ...; the message names it.
            ValueError: a hyperparameter is not finite, or a precision mode does not fit a
                parameter's dtype.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            undo: Undo = []
            try:
                self._step(undo)
            except BaseException:
                take_back(undo)
                raise
        return loss

    def _step(self, undo: Undo) -> None:
        # Gone until the step is made: a plan that raised may be stale.
        plan, self._plan = self._plan, None
        rows = Rows(self)
        if not rows.on_device and rows.scaling.skips:
            self._measure(rows.inv_scale)
        else:
            if plan is None or not plan.holds(self, rows):
                plan = Plan(self, rows, undo)
            plan.run(self, rows, undo)
        if plan is not None and plan.reusable:
            self._plan = plan

    @staticmethod
    def profile_hook_step(step: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps `step` in, for hooks and profilers; free where a step begins without.

        Python cannot tell of an `ExecutionTraceObserver` without a profiler: it misses the step.
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

        return wrapper

    def _measure(self, inv_scale: float) -> None:
        """Sets `grad_norm` for a step that is skipped."""
        self.grad_norm = None
        if any(group["max_norm"] is not None for group in self.param_groups):
            params = [param for group in self.param_groups for param in group["params"]]
            grads = [param.grad for param in params if param.grad is not None]
            self.grad_norm = get_total_norm(grads) * inv_scale

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch.

        Raises:
            ValueError: a setting is out of range.
        """
        if isinstance(param_group, dict):
            _check_settings(self.rule, {**self.defaults, **param_group})
        with self._lock:
            super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any], lossy: bool = False) -> None:
        """Loads a state dict of this class or of the torch class of the same name.

        Unlike torch, which casts states to the parameter's dtype, this keeps their precision, and
        copies them, so that the optimizer shares no memory with ``state_dict``. ``master_weights``
        and ``state_dtype`` remain what they are; what the state dict has in another form is
        converted, masters by the next step. So the model may be loaded before or after this; but
        before it, where its parameters had 16 bits and have 32 now. A state dict of torch is
        rounded as it has to be.

        Args:
            lossy: convert also what cannot be converted exactly.

        Raises:
            ValueError: a conversion would lose something (without ``lossy``), or the state dict
                has other groups; nothing was changed.
            RuntimeError: a state does not fit its parameter; nothing was changed.
        """
        saved: list[Group] = []

        def prepare(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.extend(state_dict["param_groups"])
            return checkpoints.prepare(optimizer, state_dict)

        with self._lock:
            # Registered only now, to run after the user's hooks.
            handle = self.register_load_state_dict_pre_hook(prepare)
            before = self.state, self.param_groups, self._plan
            try:
                super().load_state_dict(state_dict)
                checkpoints.convert(self, saved, lossy)
            except BaseException:
                self.state, self.param_groups, self._plan = before
                raise
            finally:
                handle.remove()

    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict` as `torch.optim` wants it, where ``state_dtype`` is ``"8bit"``.

        The states are fp32 numbers under torch's names; what belongs to master weights is left out
        (see `master_params`). The other modes' state dicts load into `torch.optim` as they are.
        """
        return checkpoints.for_torch(self)

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
                state = self.state.get(param, {})
                yield precision.master(group, param, state, Place(group, g, i))

    def state_dict(self) -> dict[str, Any]:
        """As in torch; remainders are 0 where the parameter was written since the last step.

        The groups have ``state_dtype`` as a word: `torch.distributed.checkpoint` refuses to gather
        state dicts that hold a dtype.
        """
        with self._lock:
            for param, state in self.state.items():
                precision.settle(param, state)
            # Registered only now, to run before the user's hooks.
            handle = self.register_state_dict_post_hook(_without_private, prepend=True)
            try:
                return super().state_dict()
            finally:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called after unpickling, deepcopy and load_state_dict.
        super().__setstate__(state)
        self._plan = None
        self._lock = getattr(self, "_lock", None) or _new_lock()
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        self._captured = getattr(self, "_captured", [])
        checkpoints.restore(self)


def _without_private(optimizer: Any, state_dict: dict[str, Any]) -> None:
    for group in state_dict["param_groups"]:
        group["state_dtype"] = str(group["state_dtype"])
    for key, state in state_dict["state"].items():
        state_dict["state"][key] = precision.to_save(state)


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


# The names that torch gives them in its messages.
_NON_NEGATIVE = {
    "lr": "learning rate",
    "momentum": "momentum value",
    "weight_decay": "weight_decay value",
    "eps": "epsilon value",
    "alpha": "alpha value",
    "lr_decay": "lr_decay value",
    "initial_accumulator_value": "initial_accumulator_value value",
    "clip_value": "clip_value",
}


def _check_settings(rule: Rule, group: Group) -> None:
    """Raises as the optimizers' docstrings say; messages as in torch where it has them."""
    precision.check_settings(rule, group)
    for key, words in _NON_NEGATIVE.items():
        value = group.get(key)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element")
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"Invalid {words}: {value}")
    for index, beta in enumerate(group.get("betas", ())):
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if group["max_norm"] is not None and not group["max_norm"] >= 0:
        raise ValueError(f"Invalid max_norm: {group['max_norm']}")
    if not math.isfinite(group.get("dampening", 0)):
        raise ValueError(f"Invalid dampening value: {group['dampening']}")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group.get("differentiable"):
        raise NotImplementedError(
            "differentiable=True is not supported: autograd cannot see through a fused step; "
            "use the torch.optim class of the same name"
        )
    if group.get("foreach") and group.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The defaults of a param group: all arguments of a constructor but these."""
    others = ("self", "params", "backend", "__class__")
    return {key: value for key, value in arguments.items() if key not in others}


class SGD(Optimizer):
    """SGD with momentum, as `torch.optim.SGD`; arguments: see `Optimizer`."""

    rule = RULES["sgd"]
    variants = (
        {"momentum": 0.9},
        {},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.1},
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        master_weights: str | None = "auto",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, _settings(locals()), backend)


class Adagrad(Optimizer):
    """Adagrad, as `torch.optim.Adagrad`; arguments: see `Optimizer`.

    The states exist from the start, as in torch.
    """

    rule = RULES["adagrad"]
    variants = ({}, {"lr_decay": 0.01, "initial_accumulator_value": 0.1})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        master_weights: str | None = "auto",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, _settings(locals()), backend)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, g = self.param_groups[-1], len(self.param_groups) - 1
        names = self.rule.states(group)
        before = dict(self.state)
        try:
            forms = [
                precision.kept(self.rule, group, param, names, Place(group, g, i))
                for i, param in enumerate(group["params"])
            ]
            for param, kept in zip(group["params"], forms, strict=True):
                if param.is_floating_point() and param not in self.state:
                    self.state[param] = new_states(self.rule, group, param, {}, kept).new
        except BaseException:
            self.param_groups.pop()
            self.state.clear()
            self.state.update(before)
            raise

    def share_memory(self) -> None:
        """Moves the states to shared memory, for training by several processes."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()


class RMSprop(Optimizer):
    """RMSprop, as `torch.optim.RMSprop`; arguments: see `Optimizer`.

    Other than torch's, it is never NaN where ``centered`` meets rounding.
    """

    rule = RULES["rmsprop"]
    variants = (
        {},
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "momentum": 0.9},
    )

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        master_weights: str | None = "auto",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, _settings(locals()), backend)


class Adam(Optimizer):
    """Adam and AMSGrad, as `torch.optim.Adam`; arguments: see `Optimizer`."""

    rule = RULES["adam"]
    variants = ({}, {"amsgrad": True})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        clip_value: float | None = None,
        master_weights: str | None = "auto",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, _settings(locals()), backend)


class AdamW(Adam):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`; arguments: see `Optimizer`."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        clip_value: float | None = None,
        master_weights: str | None = "auto",
        state_dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        settings = _settings(locals())
        super().__init__(params, **settings, backend=backend, decoupled_weight_decay=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of Adam may say otherwise
            group["decoupled_weight_decay"] = True


OPTIMIZERS: tuple[type[Optimizer], ...] = (SGD, Adagrad, RMSprop, Adam, AdamW)
