"""fastopt's precision modes, by the names that the benchmarks give them."""

from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from .contenders import Contender, Fastopt

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Mode(Fastopt):
    """fastopt with settings for parameters of one dtype."""

    title: ClassVar[str]
    dtype: ClassVar[torch.dtype]


def mode(title: str, dtype: torch.dtype, **settings: Any) -> type[Mode]:
    members = {"name": f"fastopt, {title}", "title": title, "dtype": dtype}
    return type("Mode", (Mode,), {**members, "settings": MappingProxyType(settings)})


def bf16(title: str, **settings: Any) -> type[Mode]:
    return mode(f"bf16 + {title}", torch.bfloat16, **settings)


FP32 = mode("fp32", torch.float32)
FP32_8BIT = mode("fp32 + 8-bit states", torch.float32, state_dtype="8bit")
SPLIT = bf16("split", master_weights="split")
SPLIT_BF16 = bf16("split + bf16 states", master_weights="split", state_dtype=torch.bfloat16)
SPLIT_8BIT = bf16("split + 8-bit states", master_weights="split", state_dtype="8bit")
FULL = bf16("fp32 master", master_weights="fp32")
STOCHASTIC = bf16("stochastic", master_weights="stochastic")
STOCHASTIC_8BIT = bf16("stochastic + 8-bit states", master_weights="stochastic", state_dtype="8bit")
PLAIN = bf16("no master", master_weights=None)
PLAIN_BF16 = bf16("no master + bf16 states", master_weights=None, state_dtype=torch.bfloat16)
FP16_FULL = mode("fp16 + fp32 master", torch.float16, master_weights="fp32")


class Case(NamedTuple):
    """Somebody on parameters of some dtype."""

    kind: type[Contender]
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, str]:
        """Who it is, and the precision."""
        if issubclass(self.kind, Mode):
            return Fastopt.name, self.kind.title
        return self.kind.name, SHORT[self.dtype]

    @property
    def name(self) -> str:
        return ", ".join(self.names)


def cases(*modes: type[Mode]) -> list[Case]:
    return [Case(mode, mode.dtype) for mode in modes]
