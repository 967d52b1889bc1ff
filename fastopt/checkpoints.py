"""State dicts: past torch's casts, into the form that the optimizer keeps its numbers in."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import precision, settings
from .packing import DTYPES
from .rule import Group, Rule, arithmetic_dtype
from .step import checks, shards
from .step.params import Place


def scripts(rule: Rule) -> tuple[str, ...]:
    """The settings that are the script's: state dicts leave them out, and ignore them on loading.

    They are those that torch lacks. `torch.distributed.checkpoint` requires of a checkpoint every
    key that `state_dict` returns, and one of torch must do.
    """
    return (*precision.SETTINGS, "max_norm", "clip_value", "seed", *rule.beyond_torch)


#: The states of torch's other optimizers.
_TORCHS = {
    *("acc_delta", "ax", "col_var", "eta", "exp_inf", "mu", "mu_product", "old_dirs", "prev"),
    *("prev_flat_grad", "row_var", "step_size", "variance"),
}


class ParamGroup(Group):
    """A param group. Iterating over it skips the settings that state dicts skip.

    Required by ``StateDictOptions(flatten_optimizer_state_dict=True)``, which looks for each key
    that it meets so in the state dict. `keys`, `items`, `dict` and all else have every setting.
    Copies and pickles are plain dicts.
    """

    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, group: Group, rule: Rule) -> ParamGroup:
        made = cls(group)
        made.left_out = scripts(rule)
        return made

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.keys() if key not in self.left_out)

    def __reduce__(self) -> Any:
        return dict, ([*self.items()],)


class _Saved:
    """A tensor of a state dict, out of the reach of torch's casts."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def check_form(state_dict: Any) -> None:
    """Raises where something is not made as state dicts are.

    Raises:
        TypeError: it is not a state dict.
    """
    if not isinstance(state_dict, Mapping):
        found = f"this is a {type(state_dict).__name__}"
    elif not {"state", "param_groups"} <= state_dict.keys():
        found = f"this has the keys {[*state_dict]}"
    elif not isinstance(state_dict["state"], Mapping):
        found = f"here 'state' is a {type(state_dict['state']).__name__}"
    elif not _are_groups(state_dict["param_groups"]):
        found = "here 'param_groups' is something else"
    else:
        return
    raise TypeError(
        "a state dict has a dict 'state' and a list 'param_groups' of dicts with 'params', and "
        f"{found}: load what optimizer.state_dict() has returned"
    )


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for group in groups
    )


def _check(
    rule: Rule,
    own_groups: list[Group],
    names: Iterable[str],
    known: Iterable[str],
    groups: list[Group],
    states: Mapping[Any, Any],
) -> None:
    """Raises where no optimizer like this one can have saved these groups and states.

    The host waits for a GPU. Shapes are left to `convert`.
    """
    found = [
        (group, states[index], Place(own, g, i))
        for g, (group, own) in enumerate(zip(groups, own_groups, strict=True))
        for i, index in enumerate(group["params"])
        if index in states
    ]
    foreign = (precision.keys(known) | _TORCHS) - precision.keys(rule.states)
    for _, state, where in found:
        _check_owner(rule, foreign, state, where)
    for g, group in enumerate(groups):
        settings.check_group(rule, group, g, names, may_wait=True)
    for group, state, where in found:
        _check_state(rule, group, state, where)


def _check_owner(rule: Rule, foreign: Container[str], state: Any, where: Place) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{where} has a state that is a {type(state).__name__}, not a dict: load what "
            "optimizer.state_dict() has returned"
        )
    if found := next((key for key in state if key in foreign), None):
        raise ValueError(
            f"{where} has a state {found!r}, which is not one of {rule.name}'s: load a state "
            "dict of an optimizer of the same class"
        )


def _check_state(rule: Rule, group: Group, state: Mapping[str, Any], where: Place) -> None:
    if "step" in state and not getattr(state["step"], "is_meta", False):  # see `convert`
        checks.check_step(state["step"], where, may_wait=True)
    there = [key for key, value in state.items() if value is not None]
    # A rule that counts no steps makes what is missing, and then makes a first step.
    if rule.counts_steps and any(key in there for key in ("step", *precision.keys(rule.states))):
        for name in ("step", *rule.states_of(group)):
            if not {name, *precision.coded_keys(name)}.intersection(there):
                raise ValueError(
                    f"{where} has no state {name!r}, but {', '.join(map(repr, there))}: load a "
                    "state dict that is complete"
                )
    for name in rule.states:
        _, scale = precision.coded_keys(name)
        for key in (name, scale):
            if key in there:
                _check_numbers(state[key], key, key == scale, name in rule.non_negative, where)


def _check_numbers(
    numbers: Any, name: str, are_scales: bool, non_negative: bool, where: Place
) -> None:
    """Raises where an entry of a state has numbers that no step makes.

    NaN and infinity are made by a step where a gradient was not finite: torch loads them too. The
    scale of such numbers is NaN. Of a DTensor each process looks at its own part, without a
    collective: the others do not raise.
    """
    numbers = shards.local(numbers)
    if (
        not isinstance(numbers, Tensor)
        or numbers.dtype not in DTYPES
        or numbers.layout != torch.strided
    ):
        raise checks.misfit(where.param, name, numbers, where)
    if numbers.is_meta or checks.is_wrapper(numbers):
        return
    found = ""
    if (are_scales or non_negative) and bool((numbers < 0).any()):
        found = "negative"
    elif are_scales and bool(numbers.isinf().any()):
        found = "infinite"
    if found:
        raise ValueError(
            f"{where} has a state {name!r} with {found} numbers, which it never has: load a state "
            "dict that is not damaged"
        )


def prepare(
    rule: Rule,
    own_groups: list[Group],
    names: Iterable[str],
    known: Iterable[str],
    state_dict: dict[str, Any],
) -> dict[str, Any]:
    """A state dict with its tensors wrapped, and its groups with what they lack from ours: a torch
    checkpoint knows no `max_norm`.

    Args:
        names: the settings that a group must have.
        known: the states of all rules. All else in a state, but torch's, is the user's own.

    Raises:
        TypeError, ValueError, RuntimeError: no optimizer like this one can have saved it.
    """

    def wrapped(value: Any) -> Any:
        return _Saved(value) if isinstance(value, Tensor) else value

    groups, kept = list(state_dict["param_groups"]), scripts(rule)
    if [len(saved["params"]) for saved in groups] == [len(own["params"]) for own in own_groups]:
        groups = [
            ParamGroup.of({**own, "params": None, **saved, **{k: own[k] for k in kept}}, rule)
            for own, saved in zip(own_groups, groups, strict=True)
        ]
        _check(rule, own_groups, names, known, groups, state_dict["state"])
    # Else torch raises.
    return {
        **state_dict,
        "param_groups": groups,
        "state": {
            key: {k: wrapped(v) for k, v in values.items()} if isinstance(values, dict) else values
            for key, values in state_dict["state"].items()
        },
    }


def restore(rule: Rule, param_groups: list[Group], states: Mapping[Any, Any]) -> None:
    """Puts copies of the tensors that `prepare` wrapped where the parameters need them."""
    groups = {param: group for group in param_groups for param in group["params"]}
    for param, state in states.items():
        if not isinstance(state, dict):
            continue
        group = groups.get(param)
        names = () if group is None else rule.states_of(group)
        for name, value in list(state.items()):
            if not isinstance(value, _Saved):
                continue
            tensor = value.tensor
            if tensor.dtype != precision.MASTER_DTYPES.get(name, tensor.dtype):
                del state[name]  # torch has cast it, which destroys it
                continue
            if group is None or tensor.is_meta:  # not a parameter's, or of no use to it
                state[name] = tensor
            elif name == "step" and tensor.numel() == 1:
                on_device = group["capturable"] and param.is_cuda
                device = param.device if on_device else torch.device("cpu")
                state[name] = tensor.reshape(()).to(device, torch.float32, copy=True)
            else:
                in_bf16 = precision.state_dtype(group) == torch.bfloat16 == tensor.dtype
                plain = name in names and not in_bf16
                dtype = arithmetic_dtype(param) if plain else tensor.dtype
                state[name] = tensor.to(param.device, dtype, copy=True)


def convert(
    rule: Rule,
    groups: list[Group],
    states: Mapping[Any, Any],
    lossy: bool,
) -> None:
    """Brings the states, but for masters, into the form that the param groups ask for.

    Raises:
        ValueError: a master, or what codes stand for, would be lost without ``lossy``.
        RuntimeError: a state does not fit its parameter.
    """
    for g, group in enumerate(groups):
        names = rule.states_of(group)
        for i, param in enumerate(group["params"]):
            state = states.get(param)
            if not state:
                continue
            where = Place(group, g, i)
            here = shards.local(param)
            if param.is_meta:
                checks.check_dense(param, where)
            for name, value in state.items():
                if isinstance(value, Tensor) and value.is_meta:
                    raise RuntimeError(
                        f"{where} has a state {name!r} on the meta device, without data: load a "
                        "state dict with data"
                    )
            shards.check_state(param, state, precision.keys(rule.states), where)
            forms = precision.kept(rule, group, here, names, where, param)
            shards.piece(param, forms, where)
            for key in precision.superseded(rule, here, state, forms):
                state.pop(key, None)
            parts = shards.local_state(param, state)
            precision.check(here, parts, rule, forms, where)
            made = precision.convert(rule, here, parts, forms)
            if made.lost and not lossy:
                raise ValueError(
                    f"{where} would lose precision of its {' and '.join(made.lost)}: use the "
                    "master_weights and state_dtype that it was saved with, with a model of the "
                    "dtype and layout that it had, or pass lossy=True"
                )
            state.update(shards.whole_state(param, made.new))
            for key in made.obsolete:
                del state[key]
            if not precision.counts_steps(rule, state, forms):
                state.pop("step", None)


def for_torch(rule: Rule, groups: list[Group], state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with every state as plain numbers, and without master weights."""
    params = [(param, group) for group in groups for param in group["params"]]
    for index, (param, group) in enumerate(params):
        if index in state_dict["state"]:
            state = shards.local_state(param, state_dict["state"][index])
            plain = precision.plain(rule, shards.local(param), state, rule.states_of(group))
            state_dict["state"][index] = shards.whole_state(param, plain)
    return state_dict
