"""Fused optimizers for PyTorch."""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  first, so that the extension shares torch's OpenMP runtime

from .amp import GradScaler
from .backward import step_in_backward
from .clip import clip_grad_norm_, clip_grad_value_, get_total_norm
from .optimizer import Optimizer
from .prepare import prepare
from .rules import *  # noqa: F403
from .rules import __all__ as _rules
from .step.dispatch import Backend, backends

__version__ = _version("fastopt")

__all__ = [
    *_rules,
    "Backend",
    "GradScaler",
    "Optimizer",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
    "prepare",
    "step_in_backward",
]
