"""Who is measured: fastopt, torch.optim in its two fast forms, and on a GPU other packages."""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
    #: How many more passes over the gradients, reads or writes, a step makes where it clips.
    clip_passes: ClassVar[int]
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
    clip_passes = 1

    def build(self, rule: Rule) -> Optimizer:
        optimizer: Optimizer = rule.optimizer(self.params, lr=LR, **rule.flags)
        return optimizer

    def set_clip(self, clip: bool) -> None:
        for group in self.optimizer.param_groups:
            group["max_norm"] = MAX_NORM if clip else None


class FastoptLowStates(Fastopt):
    """With states of the parameters' dtype, as torch's are where that is bf16."""

    name = "fastopt, 16-bit states"

    def build(self, rule: Rule) -> Optimizer:
        optimizer = super().build(rule)
        optimizer.step()
        for param, state in optimizer.state.items():
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(param.dtype)
        return optimizer


class ClipsApart(Contender):
    """What has no clipping of its own, and gets torch's.

    That rescales the gradients themselves. Those that are not renewed have norm 1 from the second
    round on, which changes nobody's work or traffic.
    """

    clip_passes = 3  # the norm reads, the scaling reads and writes

    def run(self) -> None:
        if self.clip:
            clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()


class Torch(ClipsApart):
    """torch.optim's class of the same name, with one implementation chosen."""

    implementation: ClassVar[str]

    def build(self, rule: Rule) -> Optimizer:
        peer = getattr(torch.optim, rule.title, None)
        if peer is None or self.implementation not in inspect.signature(peer).parameters:
            raise UnavailableError(f"torch has no {self.implementation} {rule.title}")
        optimizer: Optimizer = peer(self.params, lr=LR, **{self.implementation: True}, **rule.flags)
        return optimizer


class TorchFused(Torch):
    name = "torch fused"
    implementation = "fused"


class TorchForeach(Torch):
    name = "torch foreach"
    implementation = "foreach"


class Package(ClipsApart):
    """Another package's optimizer, where that is installed; its own defaults."""

    module: ClassVar[str]
    #: By the rule's title: the class, and what makes it that rule.
    classes: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]]

    def build(self, rule: Rule) -> Optimizer:
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise UnavailableError(str(error)) from None
        if rule.title not in self.classes:
            raise UnavailableError(f"it has no {rule.title}")
        name, settings = self.classes[rule.title]
        optimizer: Optimizer = getattr(module, name)(self.params, lr=LR, **settings, **rule.flags)
        return optimizer


class Optimi(Package):
    name = "optimi"
    module = "optimi"
    classes = MappingProxyType({title: (title, {}) for title in ("SGD", "Adam", "AdamW")})


class FlashOptim(Package):
    name = "flashoptim"
    module = "flashoptim"
    classes = MappingProxyType({title: (f"Flash{title}", {}) for title in ("SGD", "Adam", "AdamW")})


class BitsAndBytes(Package):
    name = "bitsandbytes"
    module = "bitsandbytes.optim"
    classes = MappingProxyType(
        {title: (title, {}) for title in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")}
    )


class Apex(Package):
    name = "apex"
    module = "apex.optimizers"
    classes = MappingProxyType(
        {
            "SGD": ("FusedSGD", {}),
            "Adagrad": ("FusedAdagrad", {}),
            "Adam": ("FusedAdam", {"adam_w_mode": False}),
            "AdamW": ("FusedAdam", {"adam_w_mode": True}),
        }
    )


class TorchAO(Package):
    name = "torchao 8-bit"
    module = "torchao.optim"
    classes = MappingProxyType({"Adam": ("Adam8bit", {}), "AdamW": ("AdamW8bit", {})})
