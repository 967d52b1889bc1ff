"""What GPUs ask of the host: not to wait for them, and to know what a CUDA graph will repeat."""

from __future__ import annotations

import contextlib
from typing import Any, TypeGuard

import torch
from torch import Tensor


def is_on_device(value: Any) -> TypeGuard[Tensor]:
    """Whether the host would have to wait for a value."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in the memory of a device; the host waits only for what it is to read itself."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with guard(device):
        return bool(torch.cuda.is_current_stream_capturing())
