"""How a param group keeps its numbers: what ``master_weights`` and ``state_dtype`` mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .packing import PACKINGS, Stored, b_shape, memory_order
from .reference import arithmetic_dtype
from .rules import Group, Rule

MASTER_WEIGHTS = ("auto", "fp32", "split", "stochastic", None)
STATE_DTYPES = (torch.float32, torch.bfloat16, "8bit")

State = dict[str, Any]


class Kept(NamedTuple):
    """How some numbers of a parameter are kept.

    Args:
        numbers: the name of the rule's state; "" for the parameter itself.
        packing: as in `Stored`.
        a: the key of the first array in the parameter's state; None: the parameter.
        b: that of the second array; None: there is none.
    """

    numbers: str
    packing: str | None
    a: str | None
    b: str | None

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.a, self.b) if key is not None]

    def stored(self, param: Tensor, state: State) -> Stored:
        return Stored(
            param if self.a is None else state[self.a],
            self.packing,
            None if self.b is None else state[self.b],
        )


# All the ways in which a checkpoint can keep the numbers of a 16-bit parameter and of a state.
_MASTERS = (
    Kept("", "remainder", None, "param_remainder"),
    Kept("", "master_of_bfloat16", None, "master_param"),
    Kept("", "master_of_float16", None, "master_param"),
)


def kept(rule: Rule, group: Group, param: Tensor, names: tuple[str, ...]) -> list[Kept]:
    """How a group keeps a parameter and its states called ``names``, in this order.

    Raises:
        ValueError: a setting does not fit the parameter's dtype.
    """
    return [_param_kept(group, param), *(_state_kept(rule, group, param, name) for name in names)]


def _param_kept(group: Group, param: Tensor) -> Kept:
    mode = group["master_weights"]
    if mode is None or param.dtype not in (torch.bfloat16, torch.float16):
        return Kept("", None, None, None)
    half = param.dtype == torch.float16
    if mode == "auto":
        mode = "fp32" if half or dispatch.is_wrapper(param) else "split"
    if mode == "fp32":
        return _MASTERS[2 if half else 1]
    if half:
        raise ValueError(
            f"is torch.float16, which master_weights={mode!r} is not for: use 'auto', 'fp32' or "
            "None, or a bfloat16 model"
        )
    if dispatch.is_wrapper(param):
        raise ValueError(
            f"is a {type(param).__name__}, for which master_weights={mode!r} does not work: use "
            "'auto', 'fp32' or None"
        )
    return _MASTERS[0] if mode == "split" else Kept("", "stochastic", None, None)


def _state_kept(rule: Rule, group: Group, param: Tensor, name: str) -> Kept:
    wanted = group["state_dtype"]
    if wanted == torch.float32:  # or, in fact, the dtype of the arithmetic
        return Kept(name, None, name, None)
    if param.dtype == torch.float64:
        raise ValueError(f"is torch.float64, and so must be its states: not state_dtype={wanted!r}")
    if dispatch.is_wrapper(param):
        raise ValueError(
            f"is a {type(param).__name__}, for which state_dtype={wanted!r} does not work: use "
            "torch.float32"
        )
    if wanted == torch.bfloat16:
        return Kept(name, "stochastic", name, None)
    return _coded(rule, name)


def _coded(rule: Rule, name: str) -> Kept:
    packing = "unsigned_codes" if name in rule.non_negative else "codes"
    return Kept(name, packing, f"{name}_codes", f"{name}_scale")


def check_settings(rule: Rule, group: Group) -> None:
    """Raises where no parameter could have these settings.

    Raises:
        ValueError: so it is.
    """
    if group["master_weights"] not in MASTER_WEIGHTS:
        raise ValueError(
            f"Invalid master_weights: {group['master_weights']!r} (one of "
            f"{', '.join(map(repr, MASTER_WEIGHTS))})"
        )
    state_dtype = group["state_dtype"]
    if state_dtype not in STATE_DTYPES:
        raise ValueError(
            f"Invalid state_dtype: {state_dtype!r} (one of {', '.join(map(repr, STATE_DTYPES))})"
        )
    if state_dtype == "8bit" and not rule.takes_8bit:
        raise ValueError(
            f"state_dtype='8bit' is not for {rule.name}: its sum of squares only grows, by less "
            "and less, and 8 bits are too few for it; use torch.bfloat16 or torch.float32"
        )
    seed = group["seed"]
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"Invalid seed: {seed!r} (an integer from 0 to 2**32 - 1)")


def is_random(forms: list[Kept]) -> bool:
    """Whether something is rounded stochastically, for which steps are counted."""
    return any(form.packing is not None and PACKINGS[form.packing].is_random for form in forms)


def check(param: Tensor, state: State, rule: Rule, forms: list[Kept], where: object) -> None:
    """Raises where an entry of a parameter's state, in any form, does not fit the parameter.

    Raises:
        RuntimeError: as in `dispatch.check_dense`.
    """
    for form in forms:
        for each in dict.fromkeys((form, *_other_forms(rule, form))):
            if _is_there(each, state):
                for key, (shape, dtypes) in _specs(each, param).items():
                    dispatch.check_state(param, key, state[key], shape, dtypes, where)


def are_there(param: Tensor, state: State, forms: list[Kept]) -> bool:
    """Whether a parameter's state has all that ``forms`` call for, as kernels need it."""
    return all(
        _is_in_place(form, param, state)
        and all(
            dispatch.fits(param, state[key], shape, dtypes)
            for key, (shape, dtypes) in _specs(form, param).items()
        )
        for form in forms
    )


class Made(NamedTuple):
    """Entries for a parameter's state.

    Args:
        new: what was missing, or there in another form.
        obsolete: the keys of that other form.
        fresh: some of the rule's states were there in no form.
        lost: what could not be converted exactly.
    """

    new: dict[str, Tensor]
    obsolete: list[str]
    fresh: bool
    lost: list[str]


def make(
    rule: Rule,
    group: Group,
    param: Tensor,
    state: State,
    forms: list[Kept],
    tell_losses: bool = False,
) -> Made:
    """What a parameter's ``state`` lacks to have its numbers in ``forms``.

    Args:
        tell_losses: fill in `Made.lost`, for which the host waits for a GPU.
    """
    new: dict[str, Tensor] = {}
    obsolete: list[str] = []
    fresh = False
    lost: list[str] = []
    wanted = {key for form in forms for key in form.keys}
    for form in forms:
        others = [other for other in _other_forms(rule, form) if _is_there(other, state)]
        obsolete += [key for other in others for key in other.keys if key not in wanted]
        in_place = _is_in_place(form, param, state)
        source = form if form.keys and _is_there(form, state) else next(iter(others), None)
        if in_place and (form.keys or source is None):
            continue
        if source is None:
            fresh |= bool(form.numbers)
            new |= _initial(form, param, rule.initial(group))
            continue
        if source == form and form.packing == "stochastic":  # of another dtype
            source = Kept(form.numbers, None, form.a, None)
        dtype = arithmetic_dtype(param)
        numbers = source.stored(param, state).unpack(dtype)
        made = _packed(form, param, numbers)
        new |= made
        if tell_losses and not _same(form.stored(param, made).unpack(dtype), numbers):
            lost.append(form.numbers or "master weights")
    return Made(new, obsolete, fresh, lost)


def masters(rule: Rule, group: Group, param: Tensor, state: State) -> Tensor:
    """What the arithmetic takes for a parameter: a new tensor, or the parameter itself, detached."""
    form = _param_kept(group, param)
    if not _is_there(form, state):
        form = Kept("", None, None, None)
    return form.stored(param, state).unpack(arithmetic_dtype(param))


def _other_forms(rule: Rule, form: Kept) -> list[Kept]:
    """The other forms that the same numbers can have."""
    if form.numbers:
        forms = [Kept(form.numbers, None, form.numbers, None), _coded(rule, form.numbers)]
        return [each for each in forms if each.keys != form.keys]
    return [each for each in _MASTERS if each.keys != form.keys]


def _is_there(form: Kept, state: State) -> bool:
    return all(state.get(key) is not None for key in form.keys)


def _is_in_place(form: Kept, param: Tensor, state: State) -> bool:
    """Whether the entries are as kernels need them: second arrays, and codes, in the order of the
    parameter's elements in memory."""
    if not _is_there(form, state):
        return False
    if form.packing is None:
        return True
    packing = PACKINGS[form.packing]
    if form.a is not None and state[form.a].dtype != packing.a:
        return False
    ordered = [form.a] if packing.is_coded else [form.b]
    dims = memory_order(param)
    return all(key is None or state[key].permute(dims).is_contiguous() for key in ordered)


def _specs(
    form: Kept, param: Tensor
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """For each entry its shape, and the dtypes that it can have."""
    shape = tuple(param.shape)
    found: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    packing = PACKINGS[form.packing] if form.packing else None
    if form.a is not None:
        coded = packing is not None and packing.is_coded
        found[form.a] = shape, (torch.uint8,) if coded else dispatch.DTYPES
    if form.b is not None:
        assert packing is not None and packing.b is not None and form.packing is not None
        found[form.b] = b_shape(form.packing, param), (packing.b,)
    return found


def _initial(form: Kept, param: Tensor, value: float) -> dict[str, Tensor]:
    """The entries of numbers that are all ``value``, or of the master of a parameter."""
    if form.b == "master_param":
        return {form.b: param.detach().to(torch.float32, copy=True)}
    packing = PACKINGS[form.packing] if form.packing else None
    found = {}
    if form.a is not None:
        dtype = packing.a if packing else arithmetic_dtype(param)
        found[form.a] = torch.full_like(param, value, dtype=dtype, requires_grad=False)
    if form.b is not None:
        assert packing is not None and form.packing is not None
        if packing.is_coded:  # whatever the scale, the codes are 0
            shape = b_shape(form.packing, param)
            found[form.b] = torch.zeros(shape, dtype=packing.b, device=param.device)
        else:
            found[form.b] = torch.zeros_like(param, dtype=packing.b, requires_grad=False)
    return found


def _packed(form: Kept, param: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    """The entries of ``numbers``, rounded to nearest."""
    if form.packing is None:
        found = torch.empty_like(param, dtype=arithmetic_dtype(param), requires_grad=False)
        return {form.a: found.copy_(numbers)} if form.a is not None else {}
    x = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(numbers)
    a, b = PACKINGS[form.packing].pack(x, _middle)
    pairs = ((form.a, a), (form.b, b))
    return {key: array for key, array in pairs if key is not None and array is not None}


def _middle(like: Tensor) -> Tensor:
    """In place of random bits: what makes stochastic rounding round to nearest."""
    return torch.full_like(like, 0x8000, dtype=torch.int64)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
