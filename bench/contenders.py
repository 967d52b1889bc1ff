"""Who is measured: fastopt, and torch.optim in its two fast forms."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import fastopt

LR = 1e-6  # hundreds of steps must leave the parameters ordinary numbers
MAX_NORM = 1.0


class UnavailableError(Exception):
    """A contender cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Rule:
    """An optimizer class and the flags that select one of its kernels."""

    optimizer: type[Any]  # of fastopt.OPTIMIZERS
    flags: Mapping[str, Any]

    @property
    def title(self) -> str:
        return self.optimizer.__name__

    @property
    def name(self) -> str:
        flags = ", ".join(f"{flag}={value}" for flag, value in self.flags.items())
        return f"{self.title}({flags})" if flags else self.title


def rules(all_variants: bool = False) -> list[Rule]:
    """Every optimizer that fastopt has, in its default variant or in all of them."""
    return [
        Rule(optimizer, flags)
        for optimizer in fastopt.OPTIMIZERS
        for flags in (optimizer.variants if all_variants else optimizer.variants[:1])
    ]


class Contender(ABC):
    """One way to do the optimizer's work of an iteration on given parameters."""

    name: ClassVar[str]
    clip = False

    def __init__(self, rule: Rule, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = self.build(rule)

    @abstractmethod
    def build(self, rule: Rule) -> Optimizer:
        """The optimizer of ``self.params``, or `UnavailableError`."""

    def set_clip(self, clip: bool) -> None:
        """Choose between step alone and clip + step."""
        self.clip = clip

    def run(self) -> None:
        """The optimizer's turn in an iteration, which is what is timed."""
        self.optimizer.step()


class Fastopt(Contender):
    name = "fastopt"

    def build(self, rule: Rule) -> Optimizer:
        optimizer: Optimizer = rule.optimizer(self.params, lr=LR, **rule.flags)
        return optimizer

    def set_clip(self, clip: bool) -> None:
        for group in self.optimizer.param_groups:
            group["max_norm"] = MAX_NORM if clip else None


class Torch(Contender):
    """torch.optim's class of the same name, with one implementation chosen.

    Its clipping rescales the gradients themselves. Those that are not renewed have norm 1 from the
    second round on, which changes nobody's work or traffic.
    """

    implementation: ClassVar[str]

    def build(self, rule: Rule) -> Optimizer:
        peer = getattr(torch.optim, rule.title, None)
        if peer is None or self.implementation not in inspect.signature(peer).parameters:
            raise UnavailableError(f"torch has no {self.implementation} {rule.title}")
        optimizer: Optimizer = peer(self.params, lr=LR, **{self.implementation: True}, **rule.flags)
        return optimizer

    def run(self) -> None:
        if self.clip:
            clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()


class TorchFused(Torch):
    name = "torch fused"
    implementation = "fused"


class TorchForeach(Torch):
    name = "torch foreach"
    implementation = "foreach"
