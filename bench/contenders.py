"""Who is measured: what a contender is, and fastopt as one. The others are in `peers`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

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
    #: What it keeps beside parameters of a dtype, as an addition to the name of that dtype.
    adds: ClassVar[str] = ""
    #: Whether what it loads or starts in a process would change the times of others there.
    own_process: ClassVar[bool] = False
    #: Whether a step takes so long that fewer rounds must do.
    slow: ClassVar[bool] = False
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
