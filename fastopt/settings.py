"""What a param group may say: the settings are checked here, when given and when changed."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import precision
from .rule import Group, Rule
from .step import checks
from .step.devices import is_on_device

#: torch's schedulers may end this little below 0: LinearLR(start_factor=1/3, end_factor=0) does.
_ROUNDING = 1e-12


def check_group(
    rule: Rule, group: Group, index: int, names: Iterable[str], may_wait: bool = False
) -> None:
    """Raises where a param group has settings that it cannot have, alone or together.

    Args:
        index: the group's, for the message.
        names: the settings that it must have, or those of them that have changed.
        may_wait: read tensors on a device too.

    Raises:
        TypeError: a setting is no number, flag or pair where it must be one.
        ValueError: a setting is missing, out of range, or not for this rule; messages begin as
            torch's where torch has them.
        NotImplementedError: ``differentiable`` is True.
        RuntimeError: ``foreach`` and ``fused`` are both True.
    """
    for name in names:
        if name not in group:
            raise ValueError(
                f"param group {index} has no {name!r}: add parameters with add_param_group, which "
                "gives a group what it lacks"
            )
        if name in _CHECKS:
            _CHECKS[name](name, group[name], index, may_wait)
        elif name in rule.hyperparameters:
            rule.checks.get(name, number())(name, group[name], index, may_wait)
    if reason := rule.unfit(group, precision.state_dtype(group)):
        raise ValueError(
            f"state_dtype={group['state_dtype']!r} is not for {rule.name}: {reason}, which needs "
            "more precision; use torch.float32"
        )
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group.get("differentiable"):
        raise NotImplementedError(
            "differentiable=True is not supported: autograd cannot see through a fused step; "
            "use the torch.optim class of the same name"
        )
    if group.get("foreach") and group.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def warn_of_typos(group: Group, names: Iterable[str], cls: str) -> None:
    """Warns of keys that look like one of the settings ``names``, which ``cls`` has, and are none.

    Frameworks have keys of their own, such as no_weight_decay and max_momentum.
    """
    names = [*names]
    for key in group:
        for name in get_close_matches(str(key), names, n=1, cutoff=0.85):
            if key not in names and f"_{name}" not in key and f"{name}_" not in key:
                checks.warn_once(
                    f"a param group has {key!r}, which {cls} does not read: did you mean {name!r}?"
                )


def _refuse(
    name: str, value: Any, index: int, wanted: str, words: str = "", error: type = ValueError
) -> NoReturn:
    found = checks.short(value)
    raise error(f"Invalid {words or name}: {found} ({name} of param group {index} {wanted})")


Check = Callable[[str, Any, int, bool], None]


def number(
    words: str = "",
    least: float = 0.0,
    most: float = sys.float_info.max,
    wanted: str = "must be a finite number from 0 on",
    is_optional: bool = False,
) -> Check:
    """Checks a number, or a tensor of one, which torch's messages call ``words``."""

    def check(name: str, value: Any, index: int, may_wait: bool) -> None:
        if type(value) is float and least <= value <= most:  # at once, the common case
            return
        if value is None and is_optional:
            return
        number = value
        if isinstance(value, Tensor):
            if value.numel() != 1:
                found = f"Tensor {name} must be 1-element"
                raise ValueError(f"{found}, and has shape {tuple(value.shape)} in group {index}")
            if is_on_device(value) and (value.is_meta or not may_wait):
                return
            number = value.item()
        if not _is_real(number):
            _refuse(name, value, index, wanted, words, TypeError)
        if not isinstance(number, int):
            number = float(number)  # the largest float overflows in a comparison with np.float32
        if not least <= number <= most:
            _refuse(name, value, index, wanted, words)

    return check


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_betas(name: str, value: Any, index: int, may_wait: bool) -> None:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        _refuse(name, value, index, "must be two numbers from 0 to below 1", error=TypeError)
    if len(value) != 2:
        _refuse(name, value, index, "must be two numbers from 0 to below 1")
    for i, check in enumerate(_BETAS):
        check(name, value[i], index, may_wait)


def _check_flag(name: str, value: Any, index: int, may_wait: bool) -> None:
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        _refuse(name, value, index, "must be True or False", error=TypeError)


def _check_optional_flag(name: str, value: Any, index: int, may_wait: bool) -> None:
    if value is not None:
        _check_flag(name, value, index, may_wait)


def _check_master_weights(name: str, value: Any, index: int, may_wait: bool) -> None:
    if not _is_one_of(value, precision.MASTER_WEIGHTS):
        _refuse(name, value, index, f"must be one of {_listed(precision.MASTER_WEIGHTS)}")


def _check_state_dtype(name: str, value: Any, index: int, may_wait: bool) -> None:
    if not _is_one_of(value, precision.STATE_DTYPES):
        _refuse(name, value, index, f"must be one of {_listed(precision.STATE_DTYPES)}")


def _is_one_of(value: Any, known: Iterable[Any]) -> bool:
    # Not by ==, of which tensors and arrays make many.
    return isinstance(value, (str, torch.dtype, type(None))) and value in known


def _listed(known: Iterable[Any]) -> str:
    return ", ".join(map(repr, known))


def _check_seed(name: str, value: Any, index: int, may_wait: bool) -> None:
    if not isinstance(value, int) or not 0 <= value < 2**32:
        _refuse(name, value, index, "must be an integer from 0 to 2**32 - 1")


_BETAS = [
    number(
        f"beta parameter at index {i}",
        most=math.nextafter(1.0, 0.0),
        wanted="must be two numbers from 0 to below 1",
    )
    for i in range(2)
]

_CHECKS: dict[str, Check] = {
    "lr": number("learning rate", least=-_ROUNDING),
    "momentum": number("momentum value"),
    "dampening": number(
        "dampening value", least=-sys.float_info.max, wanted="must be a finite number"
    ),
    "weight_decay": number("weight_decay value"),
    "eps": number("epsilon value"),
    "alpha": number("alpha value"),
    "betas": _check_betas,
    "lr_decay": number("lr_decay value"),
    "initial_accumulator_value": number("initial_accumulator_value value"),
    "max_norm": number(
        most=math.inf, wanted="must be None or a number from 0 on", is_optional=True
    ),
    "clip_value": number(wanted="must be None or a finite number from 0 on", is_optional=True),
    "master_weights": _check_master_weights,
    "state_dtype": _check_state_dtype,
    "seed": _check_seed,
    **dict.fromkeys(
        (
            *("nesterov", "centered", "amsgrad", "decoupled_weight_decay"),
            *("maximize", "capturable", "differentiable"),
        ),
        _check_flag,
    ),
    **dict.fromkeys(("foreach", "fused"), _check_optional_flag),
}
