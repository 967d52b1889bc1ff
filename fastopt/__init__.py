"""Fused optimizers for PyTorch."""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  first, so that the extension shares torch's OpenMP runtime

from .amp import GradScaler
from .clip import clip_grad_norm_, clip_grad_value_, get_total_norm
from .dispatch import Backend, backends
from .optimizers import OPTIMIZERS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from .prepare import prepare

__version__ = _version("fastopt")

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Backend",
    "GradScaler",
    "Optimizer",
    "RMSprop",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
    "prepare",
]
