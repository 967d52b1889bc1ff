"""Casts a model for training in 16 bits throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from .dynamo import untraced

M = TypeVar("M", bound=Module)


@untraced
def prepare(
    model: M,
    dtype: torch.dtype = torch.bfloat16,
    keep_fp32: Callable[[str, Module], bool] | None = None,
) -> M:
    """Casts a model in place to bf16 or fp16, except what must stay in fp32.

    As with `model.to(dtype)`, parameters stay the same objects, tied ones tied, and integer and
    complex tensors as they are. Unlike with that, layers with running statistics (BatchNorm,
    SyncBatchNorm, InstanceNorm with ``track_running_stats``) are in fp32, their weights and biases
    too: running averages get stuck in 8 bits of precision, and torch's BatchNorm takes either all
    four in 16 bits or none. What goes through these layers is in 16 bits all the same.

    Args:
        model: of any device; cast it before it is wrapped for distributed training.
        dtype: `torch.bfloat16` or `torch.float16`.
        keep_fp32: called with the names of the other modules in ``model.named_modules()``, and the
            modules: whether a module's own parameters and buffers, not those of modules within it,
            must be in fp32 too, as in ``lambda name, module: name.endswith("rotary_emb")``. Most
            layers but norms then want an fp32 input. What modules share is in fp32 in all of them.

    Returns:
        the model.

    Raises:
        ValueError: ``dtype`` is none of the two.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"prepare casts to torch.bfloat16 or torch.float16, not to {dtype}: "
            "pass one of them, or call model.to"
        )
    kept = [
        tensor
        for name, module in model.named_modules()
        if _has_statistics(module) or (keep_fp32 is not None and keep_fp32(name, module))
        for tensor in (
            *module.buffers(recurse=False),
            *module.parameters(recurse=False),
            *(param.grad for param in module.parameters(recurse=False)),
        )
    ]
    ids = set(map(id, kept))

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.float32 if id(tensor) in ids else dtype)

    # What Module.to does: some layers have their own way.
    model._apply(cast)  # type: ignore[no-untyped-call]
    return model


def _has_statistics(module: Module) -> bool:
    norms = torch.nn.modules.batchnorm._NormBase  # what all of these layers are made from
    return isinstance(module, norms) and module.running_mean is not None
