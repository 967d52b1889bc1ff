"""Who is measured: what a contender is, and fastopt as one. The others are in `peers`."""

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


class CrashedError(Exception):
    """A contender raised in a process of its own, or that died; the message tells how."""


def told(error: BaseException) -> str:
    """An error in a line: a package's may have many."""
    first_line = str(error).strip().partition("\n")[0].rstrip(".: ")
    if isinstance(error, UnavailableError | CrashedError):
        return first_line
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


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
    #: What it keeps beside parameters of a dtype, as an addition to the name of that dtype.
    adds: ClassVar[str] = ""
    #: The same with parameters of 16 bits, where that is something else.
    adds_to_halves: ClassVar[str] = ""
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
        """Chooses between step alone and clip + step."""
        self.clip = clip

    def run(self) -> None:
        """The optimizer's turn in an iteration, which is what is timed."""
        self.optimizer.step()

    @abstractmethod
    def new_scaler(self, device: str) -> torch.amp.GradScaler:
        """What `run_scaled` needs, or `UnavailableError`."""

    def run_scaled(self, scaler: torch.amp.GradScaler) -> None:
        """The turn where gradients are scaled: unscale, clip, step. Others may do it in fewer
        calls."""
        scaler.step(self.optimizer)
        scaler.update()


class Fastopt(Contender):
    name = "fastopt"

    def build(self, rule: Rule) -> Optimizer:
        try:
            optimizer: Optimizer = rule.optimizer(self.params, lr=LR, **rule.flags)
        except ValueError as error:  # the rule does not have the mode
            raise UnavailableError(str(error)) from None
        return optimizer

    def set_clip(self, clip: bool) -> None:
        for group in self.optimizer.param_groups:
            group["max_norm"] = MAX_NORM if clip else None

    def new_scaler(self, device: str) -> torch.amp.GradScaler:
        return fastopt.GradScaler(device)


class FastoptTorchScaler(Fastopt):
    """The same with torch's scaler, which differs only where there is one."""

    name = "fastopt, torch's GradScaler"

    def new_scaler(self, device: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device)


class FastoptPlain(Fastopt):
    """On plain tensors, beside those that have DTensors."""

    name = "fastopt, plain tensors"
    own_process = True


class ClipsApart(Contender):
    """What has no clipping of its own, and gets torch's.

    That rescales the gradients themselves. Those that are not renewed have norm 1 from the second
    round on, which changes nobody's work or traffic.
    """

    def run(self) -> None:
        if self.clip:
            clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()

    def new_scaler(self, device: str) -> torch.amp.GradScaler:
        if type(self).run is not ClipsApart.run:
            raise UnavailableError("it has no step under a GradScaler here")
        return torch.amp.GradScaler(device)

    def run_scaled(self, scaler: torch.amp.GradScaler) -> None:
        """torch's three calls."""
        scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.params, MAX_NORM)
        super().run_scaled(scaler)
