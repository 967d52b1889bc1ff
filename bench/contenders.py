"""Who is measured: fastopt, torch.optim in its two fast forms, and other packages."""

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


def tried(kind: type[Contender], rule: Rule, params: list[Tensor]) -> Contender:
    """A contender that has made a step, or `UnavailableError`, whatever a package may raise."""
    try:
        contender = kind(rule, params)
        contender.run()
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0].rstrip(".: ")
        raise UnavailableError(first_line or type(error).__name__) from error
    return contender


class Fastopt(Contender):
    name = "fastopt"
    clip_passes = 1
    #: Of a precision mode, see `modes`.
    settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def build(self, rule: Rule) -> Optimizer:
        optimizer: Optimizer = rule.optimizer(self.params, lr=LR, **self.settings, **rule.flags)
        return optimizer

    def set_clip(self, clip: bool) -> None:
        for group in self.optimizer.param_groups:
            group["max_norm"] = MAX_NORM if clip else None


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


class MastersByHand(ClipsApart):
    """What users write around torch's fused optimizer for parameters of 16 bits."""

    name = "torch fused, masters by hand"

    def build(self, rule: Rule) -> Optimizer:
        self.masters = [param.detach().float().requires_grad_() for param in self.params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        return TorchFused(rule, self.masters).optimizer

    @torch.no_grad()
    def run(self) -> None:
        torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.params])
        if self.clip:
            clip_grad_norm_(self.masters, MAX_NORM)
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.masters)


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
        settings = {"lr": LR, **settings, **self.more_settings(), **rule.flags}
        optimizer: Optimizer = getattr(module, name)(self.params, **settings)
        return optimizer

    def more_settings(self) -> dict[str, Any]:
        """What it has to be told about these parameters."""
        return {}


class Optimi(Package):
    name = "optimi"
    module = "optimi"
    classes = MappingProxyType({title: (title, {}) for title in ("SGD", "Adam", "AdamW")})


class FlashOptim(Package):
    name = "flashoptim"
    module = "flashoptim"
    classes = MappingProxyType({title: (f"Flash{title}", {}) for title in ("SGD", "Adam", "AdamW")})

    def more_settings(self) -> dict[str, Any]:
        # Its default, 24 bits, is an error where there is nothing to be saved.
        return {"master_weight_bits": None} if self.params[0].dtype == torch.float32 else {}


class BitsAndBytes(Package):
    name = "bitsandbytes"
    module = "bitsandbytes.optim"
    classes = MappingProxyType(
        {title: (title, {}) for title in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")}
    )


class BitsAndBytes8Bit(Package):
    name = "bitsandbytes 8-bit"
    module = "bitsandbytes.optim"
    classes = MappingProxyType(
        {title: (f"{title}8bit", {}) for title in ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")}
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
