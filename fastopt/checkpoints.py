"""State dicts: past torch's casts, into the form that the optimizer keeps its numbers in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatch, precision
from .items import Place
from .reference import arithmetic_dtype
from .rules import Group

if TYPE_CHECKING:
    from .optimizers import Optimizer

# Part of what an optimizer is, not of what it has learnt.
_KEPT = ("master_weights", "state_dtype")


class _Saved:
    """A tensor of a state dict, out of the reach of torch's casts."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def prepare(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with its tensors wrapped, and its groups with what they lack from ours: a torch
    checkpoint knows no `max_norm`."""

    def wrapped(value: Any) -> Any:
        return _Saved(value) if isinstance(value, Tensor) else value

    groups = list(state_dict["param_groups"])
    if len(groups) == len(optimizer.param_groups):  # else torch raises
        groups = [
            {**own, "params": None, **saved, **{key: own[key] for key in _KEPT}}
            for own, saved in zip(optimizer.param_groups, groups, strict=True)
        ]
    return {
        **state_dict,
        "param_groups": groups,
        "state": {
            key: {k: wrapped(v) for k, v in values.items()} if isinstance(values, dict) else values
            for key, values in state_dict["state"].items()
        },
    }


def restore(optimizer: Optimizer) -> None:
    """Puts copies of the tensors that `prepare` wrapped where the parameters need them."""
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for param, state in optimizer.state.items():
        if not isinstance(state, dict):
            continue
        group = groups.get(param)
        names = () if group is None else optimizer.rule.states(group)
        for name, value in list(state.items()):
            if not isinstance(value, _Saved):
                continue
            tensor = value.tensor
            if tensor.dtype != precision.MASTER_DTYPES.get(name, tensor.dtype):
                del state[name]  # torch has cast it, which leaves no sense in it
                continue
            if group is None or tensor.is_meta:  # not a parameter's, or of no use to it
                state[name] = tensor
            elif name == "step" and tensor.numel() == 1:
                on_device = group["capturable"] and param.is_cuda
                device = param.device if on_device else torch.device("cpu")
                state[name] = tensor.reshape(()).to(device, torch.float32, copy=True)
            else:
                in_bf16 = group["state_dtype"] == torch.bfloat16 == tensor.dtype
                plain = name in names and not in_bf16
                dtype = arithmetic_dtype(param) if plain else tensor.dtype
                state[name] = tensor.to(param.device, dtype, copy=True)


def convert(optimizer: Optimizer, saved_groups: list[Group], lossy: bool) -> None:
    """Brings the states, but for masters, into the form that the param groups ask for.

    Args:
        saved_groups: those of the state dict.

    Raises:
        ValueError: something would be lost that a fastopt optimizer has saved, without ``lossy``.
        RuntimeError: a state does not fit its parameter.
    """
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        names = optimizer.rule.states(group)
        for i, param in enumerate(group["params"]):
            state = optimizer.state.get(param)
            if not state:
                continue
            where = Place(group, g, i)
            if param.is_meta:
                dispatch.check_dense(param, where)
            for name, value in state.items():
                if isinstance(value, Tensor) and value.is_meta:
                    raise RuntimeError(
                        f"{where} has a state {name!r} on the meta device, without data: load a "
                        "state dict with data"
                    )
            forms = precision.kept(optimizer.rule, group, param, names, where)
            for key in precision.superseded(optimizer.rule, param, state, forms):
                state.pop(key, None)
            precision.check(param, state, optimizer.rule, forms, where)
            made = precision.convert(optimizer.rule, param, state, forms)
            if made.lost and "state_dtype" in saved and not lossy:
                raise ValueError(
                    f"{where} would lose precision of its {' and '.join(made.lost)}, saved with "
                    f"master_weights={saved['master_weights']!r} and "
                    f"state_dtype={str(saved['state_dtype'])!r}: use these settings, with a "
                    "model of the dtype and layout that it had, or pass lossy=True"
                )
            state.update(made.new)
            for key in made.obsolete:
                del state[key]


def for_torch(optimizer: Optimizer) -> dict[str, Any]:
    """A state dict with every state as plain numbers, and without master weights."""
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        for key in _KEPT:  # they do not hold any more, should it come back
            del group[key]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for index, (param, group) in enumerate(zip(params, groups, strict=True)):
        if index in state_dict["state"]:
            state = state_dict["state"][index]
            state_dict["state"][index] = precision.plain(
                optimizer.rule, param, state, optimizer.rule.states(group)
            )
    return state_dict
