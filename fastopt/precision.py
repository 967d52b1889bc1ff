"""How a param group keeps its numbers: what ``master_weights`` and ``state_dtype`` mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .packing import (
    DTYPES,
    MIN_CODE_BLOCK,
    PACKINGS,
    SUM_BLOCK,
    Stored,
    bits,
    checksums,
    code_block,
    memory_order,
    param_of,
)
from .rule import Group, Rule, arithmetic_dtype
from .step import checks, dispatch

MasterWeights = Literal["auto", "fp32", "split", "stochastic"] | None
StateDtype = torch.dtype | Literal["8bit", "float32", "bfloat16", "torch.float32", "torch.bfloat16"]

MASTER_WEIGHTS: tuple[MasterWeights, ...] = ("auto", "fp32", "split", "stochastic", None)
#: By what it may be called; state dicts have dtypes as words.
STATE_DTYPES: dict[StateDtype, torch.dtype | Literal["8bit"]] = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    "8bit": "8bit",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "torch.float32": torch.float32,
    "torch.bfloat16": torch.bfloat16,
}

_MANY = 2**20  # elements, for whose bytes one is sorry

MASTER = "master weights"  # in `Made.lost`

#: Those of a group that say how its numbers are kept.
SETTINGS = ("master_weights", "state_dtype")

State = dict[str, Any]


class Kept(NamedTuple):
    """How some numbers of a parameter are kept.

    Args:
        numbers: the name of the rule's state; "" for the parameter itself.
        packing: as in `Stored`.
        a: the key of the first array in the parameter's state; None: the parameter.
        b: that of the second array; None: there is none.
        block: see `packing.code_block`.
    """

    numbers: str
    packing: str
    a: str | None
    b: str | None
    block: int = 0

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.a, self.b) if key is not None]

    def stored(self, param: Tensor, state: State) -> Stored:
        return Stored(
            param if self.a is None else state[self.a],
            self.packing,
            None if self.b is None else state[self.b],
            None if self.b is None else _sums(param, state[self.b]),
        )


_PLAIN = Kept("", "plain", None, None)
_SPLIT = Kept("", "remainder", None, "param_remainder")

#: By the dtype of a parameter, the forms of its master that a state can have.
_MASTERS: dict[torch.dtype, tuple[Kept, ...]] = {
    torch.bfloat16: (_SPLIT, Kept("", "master_of_bfloat16", None, "master_param")),
    torch.float16: (Kept("", "master_of_float16", None, "master_param"),),
}
#: The same, whatever the dtype: it may have been another.
_ANY_MASTER = _MASTERS[torch.bfloat16]
_MASTER_KEYS = [key for form in _ANY_MASTER for key in form.keys]

#: By the key in a parameter's state.
MASTER_DTYPES = {key: PACKINGS[form.packing].b for form in _ANY_MASTER for key in form.keys}


def kept(
    rule: Rule,
    group: Group,
    param: Tensor,
    names: tuple[str, ...],
    where: object,
    whole: Tensor,
) -> list[Kept]:
    """How a group keeps a parameter and its states called ``names``, in this order.

    Args:
        where: names the parameter when formatted.
        whole: what the parameter is a shard of, or itself.

    Raises:
        ValueError: a setting does not fit the parameter's dtype.
    """
    block = code_block(whole)
    states = (_state_kept(rule, group, param, name, where, block) for name in names)
    return [_param_kept(group, param, where), *states]


def _param_kept(group: Group, param: Tensor, where: object) -> Kept:
    mode = group["master_weights"]
    if mode is None or param.dtype not in (torch.bfloat16, torch.float16):
        return _PLAIN
    half = param.dtype == torch.float16
    if mode == "auto":
        mode = "fp32" if half or checks.is_wrapper(param) else "split"
    if mode == "fp32":
        return _MASTERS[param.dtype][-1]
    if half:
        raise ValueError(
            f"{where} is torch.float16, which master_weights={mode!r} is not for: use 'auto', "
            "'fp32' or None, or a bfloat16 model"
        )
    if checks.is_wrapper(param):
        raise ValueError(
            f"{where} is a {type(param).__name__}, for which master_weights={mode!r} does not "
            "work: use 'auto', 'fp32' or None"
        )
    return _SPLIT if mode == "split" else Kept("", "stochastic", None, None)


def _state_kept(
    rule: Rule, group: Group, param: Tensor, name: str, where: object, block: int
) -> Kept:
    wanted = state_dtype(group)
    if wanted == torch.float32:  # or, in fact, the dtype of the arithmetic
        return Kept(name, "plain", name, None)
    if param.dtype == torch.float64:
        raise ValueError(
            f"{where} is torch.float64, and so must be its states: not state_dtype={wanted!r}"
        )
    if checks.is_wrapper(param):
        raise ValueError(
            f"{where} is a {type(param).__name__}, for which state_dtype={wanted!r} does not "
            "work: use torch.float32"
        )
    if wanted == torch.bfloat16:
        return Kept(name, "stochastic", name, None)
    if block:
        return _coded(rule, name, block)
    if param.numel() >= _MANY:
        checks.warn_once(
            f"{where} keeps its states in fp32, not in 8 bits: only rows, of an index of dimension "
            f"0, that lie in one piece of memory and have a multiple of {MIN_CODE_BLOCK} elements "
            "have codes"
        )
    return Kept(name, "plain", name, None)


def _coded(rule: Rule, name: str, block: int) -> Kept:
    packing = "unsigned_codes" if name in rule.non_negative else "codes"
    return Kept(name, packing, *coded_keys(name), block)


def keys(names: Iterable[str]) -> set[str]:
    """Those of the states called ``names``, in any form."""
    return {key for name in names for key in (name, *coded_keys(name))}


def coded_keys(name: str) -> tuple[str, str]:
    """The keys of a state in 8 bits."""
    return f"{name}_codes", f"{name}_scale"


def state_dtype(group: Group) -> torch.dtype | Literal["8bit"]:
    """What a group's ``state_dtype`` means."""
    return STATE_DTYPES[group["state_dtype"]]


def is_random(forms: list[Kept]) -> bool:
    """Whether something is rounded stochastically, for which steps are counted."""
    return any(PACKINGS[form.packing].is_random for form in forms)


def counts_steps(rule: Rule, state: State, forms: list[Kept]) -> bool:
    """Whether a parameter's ``state`` can have a ``step``: for a rule that counts none, for random
    numbers, or beside its states, which tells the first step."""
    has_states = len(forms) > 1 and all(_is_there(form, state) for form in forms[1:])
    return rule.counts_steps or is_random(forms) or has_states


def check(param: Tensor, state: State, rule: Rule, forms: list[Kept], where: object) -> None:
    """Raises where an entry of a parameter's state, in any form, does not fit the parameter.

    Raises:
        RuntimeError: as in `checks.check_dense`.
    """
    for form in forms:
        others = _other_forms(rule, form, param) if form.numbers else _ANY_MASTER
        for each in dict.fromkeys((form, *others)):
            present = [key for key in each.keys if state.get(key) is not None]
            if each.numbers and len(present) < len(each.keys) and present:
                (missing,) = {*each.keys} - {*present}
                raise RuntimeError(
                    f"{where} has a state {present[0]!r} without {missing!r}: load a state dict "
                    "with both, or delete the parameter's entry in optimizer.state"
                )
            if _is_there(each, state):
                for key, (shape, dtypes) in _specs(each, param, state).items():
                    checks.check_state(param, key, state[key], shape, dtypes, where)
                    if checks.is_wrapper(param) and not checks.is_wrapper(state[key]):
                        raise RuntimeError(
                            f"{where} is a {type(param).__name__} and its state {key!r} a plain "
                            "tensor: load a state dict that was saved from such a model, with "
                            "these precision modes"
                        )


def are_there(param: Tensor, state: State, forms: list[Kept]) -> bool:
    """Whether a parameter's state has all that ``forms`` call for, as kernels need it."""
    return all(
        _is_there(form, state)
        and all(
            checks.fits(param, state[key], shape, dtypes)
            for key, (shape, dtypes) in _specs(form, param, state).items()
        )
        and _is_in_place(form, param, state)
        and (form is not _SPLIT or _sums(param, state["param_remainder"]) is not None)
        for form in forms
    )


class Made(NamedTuple):
    """Entries for a parameter's state.

    Args:
        new: what was missing, or there in another form.
        obsolete: the keys of that other form.
        fresh: some of the rule's states were there in no form.
        lost: what could not be converted exactly; known after `convert`.
    """

    new: State
    obsolete: list[str]
    fresh: bool
    lost: list[str]


def make(rule: Rule, group: Group, param: Tensor, state: State, forms: list[Kept]) -> Made:
    """What a parameter's ``state`` lacks to have its numbers in ``forms``."""
    made = Made({}, [], False, [])
    for form in forms:
        source = _source(rule, form, param, state, forms, made.obsolete)
        if source is not None:
            made.new.update(_packed(form, param, source.stored(param, state)))
        elif not _is_there(form, state):
            made.new.update(_initial(form, param, rule.initial(group)))
            made = made._replace(fresh=made.fresh or bool(form.numbers))
        if form is _SPLIT and form.b is not None:
            remainder = made.new[form.b] if form.b in made.new else state[form.b]
            if _sums(param, remainder) is None:
                # Not an entry of its own: state dicts, which may be resharded, are without it.
                made.new[form.b] = remainder.detach()
                made.new[form.b]._checksums = _checksums(param, remainder)
    return made


def is_leaving(group: Group, key: str) -> bool:
    """Whether an entry of a parameter's state belongs to a master that the next step drops."""
    return key in _MASTER_KEYS and group["master_weights"] in (None, "stochastic")


def to_save(param: Tensor, state: State) -> State:
    """What is saved otherwise of a parameter's state than it is: a remainder without its checksums,
    and 0 where it no longer holds."""
    if "param_remainder" not in state:
        return {}
    remainder = state["param_remainder"]
    if param.dtype == torch.bfloat16:
        # None where the remainder fits no such parameter, or has belonged to it all along.
        sums = _sums(param, remainder) if are_there(param, state, [_SPLIT]) else None
        if sums is not None and not _checksums(param, remainder).equal(sums):
            remainder = _SPLIT.stored(param, state).valid_b()
    return {"param_remainder": remainder.detach()}


def share_memory(state: State) -> None:
    """Moves the tensors of a parameter's state to shared memory."""
    for tensor in state.values():
        tensor.share_memory_()
        if (sums := getattr(tensor, "_checksums", None)) is not None:
            sums.share_memory_()


def _checksums(param: Tensor, order: Tensor) -> Tensor:
    """As the specification's, which needs more memory than the parameter."""
    extension = dispatch.extension()
    in_order = param.detach().permute(memory_order(order))
    if extension is None or param.device.type != "cpu" or not in_order.is_contiguous():
        return checksums(param, order)
    sums = torch.empty(_sums_shape(param), dtype=torch.int32, device="cpu")
    extension.checksums(param.data_ptr(), param.numel(), sums.data_ptr(), torch.get_num_threads())
    return sums


def convert(rule: Rule, param: Tensor, state: State, forms: list[Kept]) -> Made:
    """The same, but only of what ``state`` has in another form. The host waits for a GPU.

    Masters are left to the next step: it is the parameter that makes numbers of them, and the model
    may be loaded after its optimizer.
    """
    made = Made({}, [], False, [])
    dtype = arithmetic_dtype(param)
    for form in forms:
        if not form.numbers:
            if _loses_master(form, param, state):
                made.lost.append(MASTER)
            continue
        source = _source(rule, form, param, state, forms, made.obsolete)
        if source is not None:
            numbers = source.stored(param, state)
            new = _packed(form, param, numbers)
            made.new.update(new)
            # Plain numbers are rounded as ``state_dtype`` says, whether torch saved them or we.
            if source.packing != "plain" and not _same(
                form.stored(param, new).unpack(dtype), numbers.unpack(dtype)
            ):
                made.lost.append(form.numbers)
    return made


def superseded(rule: Rule, param: Tensor, state: State, forms: list[Kept]) -> list[str]:
    """The keys of those ``forms`` whose numbers are in a loaded ``state`` in another form too.

    `torch.distributed.checkpoint` with ``full_state_dict=True`` adds what it loads to the states
    that it has made the optimizer begin with.
    """
    return [
        key
        for form in forms
        if any(_is_there(other, state) for other in _other_forms(rule, form, param))
        for key in form.keys
    ]


def _loses_master(form: Kept, param: Tensor, state: State) -> bool:
    """Whether ``form`` cannot have the master that is in ``state``, whatever the parameter is now.

    If the parameter takes no master any more: whether its value differs from the saved master.
    """
    remainder, master = state.get("param_remainder"), state.get("master_param")
    if form.keys and (param.dtype == torch.bfloat16 or master is not None):
        return False
    in_16_bits = param.dtype in _MASTERS
    if master is not None:
        return not _same(param_of(master, param.dtype) if in_16_bits else param.detach(), master)
    if remainder is not None:  # the lower half of the bits
        low = bits(param.detach()) if param.dtype == torch.float32 else 0
        return bool((low - remainder & 0xFFFF).any())
    return False


def plain(rule: Rule, param: Tensor, state: State, names: tuple[str, ...]) -> State:
    """A parameter's state with the states called ``names`` as plain numbers, without its master."""
    forms = [_PLAIN, *(Kept(name, "plain", name, None) for name in names)]
    made = convert(rule, param, state, forms)
    without = {*made.obsolete, *_MASTER_KEYS}
    return {k: v for k, v in {**state, **made.new}.items() if k not in without}


def master(group: Group, param: Tensor, state: State, where: object) -> Tensor:
    """What the arithmetic takes for a parameter.

    Raises:
        ValueError: as in `kept`.
    """
    form = _param_kept(group, param, where)
    if not _is_there(form, state):  # then the next step converts or makes it
        others = _MASTERS.get(param.dtype, ())
        form = next((other for other in others if _is_there(other, state)), _PLAIN)
    return form.stored(param, state).unpack(arithmetic_dtype(param))


def _source(
    rule: Rule,
    form: Kept,
    param: Tensor,
    state: State,
    forms: list[Kept],
    obsolete: list[str],
) -> Kept | None:
    """The form that some numbers have now, where that is not ``form``.

    Adds the keys that are not wanted any more to ``obsolete``.
    """
    wanted = {key for each in forms for key in each.keys}
    others = [other for other in _other_forms(rule, form, param) if _is_there(other, state)]
    keys = [key for other in others for key in other.keys] if form.numbers else _MASTER_KEYS
    obsolete += [key for key in keys if key in state and key not in wanted]
    other = others[0] if others else None
    if not form.keys:
        return other
    if not _is_there(form, state):
        return other
    if _is_in_place(form, param, state):
        return None
    if form.packing == "stochastic":  # of another dtype or order
        return Kept(form.numbers, "plain", form.a, None)
    return form


def _other_forms(rule: Rule, form: Kept, param: Tensor) -> list[Kept]:
    """The other forms that the same numbers can have."""
    if form.numbers:
        plain = Kept(form.numbers, "plain", form.numbers, None)
        forms = [plain, _coded(rule, form.numbers, form.block)]
        return [each for each in forms if each.keys != form.keys]
    return [each for each in _MASTERS.get(param.dtype, ()) if each.keys != form.keys]


def _is_there(form: Kept, state: State) -> bool:
    return all(state.get(key) is not None for key in form.keys)


def _sums(param: Tensor, remainder: Tensor) -> Tensor | None:
    """A remainder's `Stored.sums`; None where it has none that fit the parameter."""
    sums = getattr(remainder, "_checksums", None)
    return sums if checks.fits(param, sums, _sums_shape(param), (torch.int32,)) else None


def _sums_shape(param: Tensor) -> tuple[int]:
    return (math.ceil(param.numel() / SUM_BLOCK),)


def _is_in_place(form: Kept, param: Tensor, state: State) -> bool:
    """Whether the entries are as kernels need them: of their dtypes, and all arrays of a packing in
    the order of the parameter's elements in memory, by which blocks and random numbers go."""
    if not _is_there(form, state):
        return False
    packing = PACKINGS[form.packing]
    if form.a is not None and state[form.a].dtype != (packing.a or arithmetic_dtype(param)):
        return False
    if form.packing == "plain":
        return True
    ordered = form.keys
    if packing.is_coded:
        codes, scale = (state[key] for key in form.keys)
        if scale.shape != packing.b_shape(codes.shape, form.block) or not scale.is_contiguous():
            return False
        ordered = form.keys[:1]
    dims = memory_order(param)
    return all(state[key].permute(dims).is_contiguous() for key in ordered)


def _specs(
    form: Kept, param: Tensor, state: State
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """For each entry its shape, and the dtypes that it can have."""
    shape = tuple(param.shape)
    packing = PACKINGS[form.packing]
    found: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    if form.a is not None:
        found[form.a] = shape, (packing.a,) if packing.a and packing.is_coded else DTYPES
    if form.b is not None and packing.b is not None:
        if packing.is_coded:  # whatever the block, `_is_in_place` looks at that
            row, blocks = math.prod(shape[1:]), (*getattr(state[form.b], "shape", ()), 0, 0)[1]
            shape = *shape[:1], blocks if blocks and row % blocks == 0 else 1
        found[form.b] = shape, (packing.b,)
    return found


def _initial(form: Kept, param: Tensor, value: float) -> State:
    """The entries of numbers that are all ``value``, or of the master of a parameter."""
    if form.b == "master_param":
        return {form.b: param.detach().to(torch.float32, copy=True)}
    packing = PACKINGS[form.packing]
    found: State = {}
    if form.a is not None:
        found[form.a] = packing.new_a(param).fill_(value)
    if form.b is not None:
        b = packing.new_b(param, form.block)
        assert b is not None
        found[form.b] = b.zero_()  # codes of 0 are 0 at any scale
    return found


def _packed(form: Kept, param: Tensor, stored: Stored) -> State:
    """The entries of numbers that are ``stored`` in some form, rounded to nearest."""
    if not form.keys:
        return {}
    packing = PACKINGS[form.packing]
    new = Stored(packing.new_a(param), form.packing, packing.new_b(param, form.block))
    new.pack_(stored.unpack(arithmetic_dtype(param)), _middle)
    pairs = ((form.a, new.a), (form.b, new.b))
    return {key: array for key, array in pairs if key is not None}


def _middle(like: Tensor) -> Tensor:
    """In place of random bits: what makes stochastic rounding round to nearest."""
    return torch.full_like(like, 0x80008000, dtype=torch.int64)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
