"""What no backend can take: tensors are checked here, one sentence each."""

from __future__ import annotations

import functools
import math
import reprlib
import warnings

import torch
from torch import Tensor

from ..packing import DTYPES, extent


@functools.cache
def warn_once(message: str) -> None:
    """Warns once for each message."""
    warnings.warn(message, stacklevel=2)


def check_dense(tensor: Tensor, where: object, prefix: str = "", sparse: str = "") -> None:
    """Raises where no backend can work on the tensor.

    Args:
        where: names the tensor when formatted, which happens only for an error.
        sparse: the optimizer that takes sparse gradients instead; "" where there is none.

    Raises:
        RuntimeError: in one sentence that begins with ``where``: what was found, and what to do.
    """
    if tensor.layout != torch.strided:
        found = f"is {tensor.layout}, and only dense tensors are supported"
        cure = f"use {sparse + ', or ' if sparse else ''}sparse=False in the embedding"
    elif tensor.is_complex():
        found, cure = "is complex, which is not supported", "optimize torch.view_as_real of it"
    elif tensor.dtype not in DTYPES:
        found = f"is {tensor.dtype}, which is not supported"
        cure = f"convert it to one of {', '.join(map(str, DTYPES))}"
    elif tensor.is_meta:
        found = "is on the meta device and has no data"
        cure = "materialize the model (to_empty, then initialize) first"
    elif lost := _lost(tensor):
        found, cure = lost, "give it data again"
    else:
        return
    raise RuntimeError(f"{prefix}{where} {found}: {cure}")


def check(param: Tensor, grad: Tensor, where: object, sparse: str = "") -> None:
    """Raises where no backend can update ``param`` with ``grad``.

    Args:
        where, sparse: as in `check_dense`.

    Raises:
        RuntimeError: as in `check_dense`.
    """
    if grad.device != param.device:
        raise RuntimeError(
            f"{where} is on {param.device} and its gradient on {grad.device}: "
            "move the parameter before the backward pass"
        )
    check_dense(param, where)
    check_dense(grad, where, "the gradient of ", sparse)
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{where} has a gradient of shape {tuple(grad.shape)}: "
            "set it to None when the parameter's data is replaced"
        )
    if grad.dtype != param.dtype and grad.dtype != _grad_dtype(param):
        raise RuntimeError(
            f"{where} is {param.dtype} and its gradient {grad.dtype}: "
            "set it to None when the parameter's dtype changes, or set parameter.grad_dtype"
        )
    if is_faking() and not is_wrapper(param):
        raise RuntimeError(
            f"{where} is real, and a FakeTensorMode is active: step outside of it, or make the "
            "model and its optimizer within it"
        )
    if param.is_inference():
        raise RuntimeError(
            f"{where} was made in inference mode and must not be changed outside of it: clone it"
        )
    if overlaps_itself(param):
        raise RuntimeError(
            f"{where} has several elements in one place of memory (an expanded tensor?): "
            "optimize the tensor that it was expanded from, or a clone"
        )


def as_sum_of_squares(given: object) -> Tensor:
    """What `step` was given, as fp64 [1]; one on a GPU is not read.

    Raises:
        TypeError: it is no number, nor a plain real tensor of one element.
        ValueError: it is negative.
    """
    if isinstance(given, Tensor):
        fits = given.numel() == 1 and given.is_floating_point() and not is_wrapper(given)
        fits &= given.layout == torch.strided and not given.is_meta
        number = given.detach().double().reshape(1) if fits else None
    else:
        fits = isinstance(given, float)  # sum([]) is no float: no gradient was seen
        number = torch.tensor([given], dtype=torch.float64, device="cpu") if fits else None
    if number is None:
        raise TypeError(
            f"sum_of_squares is {short(given)}: give a float, or a plain tensor of one number"
        )
    if number.device.type == "cpu" and number < 0:
        raise ValueError(f"sum_of_squares is negative: {short(given)}")
    return number


def check_state(
    param: Tensor,
    name: str,
    state: object,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    where: object,
) -> None:
    """Raises where a state that is there already does not fit its parameter.

    Raises:
        RuntimeError: as in `check_dense`.
    """
    if not fits(param, state, shape, dtypes):
        raise misfit(param, name, state, where)


def misfit(param: Tensor, name: str, state: object, where: object) -> RuntimeError:
    """Says that a state does not fit its parameter."""
    found = f"does not fit it ({type(state).__name__})"
    if isinstance(state, Tensor):
        kind = f"{state.dtype} of shape {tuple(state.shape)} on {state.device}"
        lost = state.layout == torch.strided and not state.is_meta and _lost(state)
        found = lost or f"does not fit it ({kind})"
    return RuntimeError(
        f"{where} on {param.device} has a state {name!r} that {found}: "
        "load a state dict of this model, or delete the parameter's entry in optimizer.state"
    )


def short(value: object) -> str:
    """A value in a part of a line, as messages show it."""
    return " ".join(reprlib.repr(value).split())


def check_step(step: object, where: object, may_wait: bool = False) -> None:
    """Raises where a state's ``step`` is no number of steps.

    Args:
        may_wait: read it on a GPU too.

    Raises:
        RuntimeError: as in `check_dense`.
    """
    if not is_count(step, may_wait):
        lost = isinstance(step, Tensor) and step.layout == torch.strided and _lost(step)
        found = "a tensor that has lost its memory" if lost else short(step)
        raise RuntimeError(
            f"{where} has a state 'step' that is no number of steps ({found}): "
            "load a state dict of this model, or delete the parameter's entry in optimizer.state"
        )


def is_count(step: object, may_wait: bool = False) -> bool:
    """Whether an object is a number of steps, or a tensor of one.

    Args:
        may_wait: read it on a GPU too.
    """
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_meta or step.layout != torch.strided:
            return False
        if step.device.type != "cpu" and not may_wait:
            return True
        step = None if _lost(step) else step.detach().item()
    return isinstance(step, (int, float)) and 0 <= step < math.inf


def fits(
    param: Tensor, state: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> bool:
    """Whether an object can be a state of the parameter, of this shape and one of these dtypes."""
    return isinstance(state, Tensor) and _is_like(param, state, shape, dtypes) and not _lost(state)


def _is_like(
    param: Tensor, state: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> bool:
    """Whether a state fits, if it has all of its memory."""
    return (
        state.shape == shape
        and state.device == param.device
        and state.dtype in dtypes
        and state.layout == torch.strided
        and not overlaps_itself(state)
    )


def _lost(tensor: Tensor) -> str:
    """What a dense tensor has lost of its memory, "" where all is there."""
    # A wrapper such as DTensor has none of its own, and needs none here.
    if tensor.numel() == 0 or is_wrapper(tensor):
        return ""
    nbytes = tensor.untyped_storage().nbytes()
    end = tensor.storage_offset() * tensor.element_size() + extent(tensor)
    if tensor.data_ptr() != 0 and nbytes >= end:
        return ""
    part = "part of its memory" if nbytes else "its memory"
    return f"has lost {part} (its storage was resized to {nbytes} bytes)"


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a subclass intercepts operators."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_faking() -> bool:
    """Whether a FakeTensorMode is active, in which nothing real is to be computed."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def hides_grad(param: Tensor) -> bool:
    """Whether a subclass keeps its gradient elsewhere than a tensor does."""
    return type(param).grad is not Tensor.grad


def _grad_dtype(param: Tensor) -> torch.dtype | None:
    return getattr(param, "grad_dtype", None)  # torch < 2.13 has no such attribute


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements lie in one place of memory."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    sizes = sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    )
    if sizes and sizes[0][0] == 0:  # expanded
        return True
    reach = 0  # from the first element to the last, over the dimensions seen so far
    for stride, size in sizes:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    # Interleaved dimensions may still not collide: look at every element's place.
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in sizes:
        places = (places[:, None] + torch.arange(size, device="cpu") * stride).view(-1)
    return len(set(places.tolist())) < places.numel()
