"""fastopt's precision modes, by the names that the benchmarks give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contenders import Contender, Fastopt, Rule

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, eq=False)
class Mode:
    """Settings of a fastopt optimizer, for parameters of one dtype."""

    name: str
    dtype: torch.dtype
    settings: Mapping[str, Any]


def mode(name: str, dtype: torch.dtype, **settings: Any) -> Mode:
    return Mode(name, dtype, settings)


def bf16(name: str, **settings: Any) -> Mode:
    return mode(name, torch.bfloat16, **settings)


FP32 = mode("fp32", torch.float32)
FP32_8BIT = mode("fp32+8bit", torch.float32, state_dtype="8bit")
SPLIT = bf16("split", master_weights="split")
SPLIT_BF16 = bf16("split+bf16", master_weights="split", state_dtype=torch.bfloat16)
SPLIT_8BIT = bf16("split+8bit", master_weights="split", state_dtype="8bit")
MASTER = bf16("master", master_weights="fp32")
STOCHASTIC = bf16("stochastic", master_weights="stochastic")
STOCHASTIC_8BIT = bf16("stochastic+8bit", master_weights="stochastic", state_dtype="8bit")
NONE = bf16("none", master_weights=None)
NONE_BF16 = bf16("none+bf16", master_weights=None, state_dtype=torch.bfloat16)
FP16_MASTER = mode("fp16-master", torch.float16, master_weights="fp32")

MODES = {
    each.name: each
    for each in (
        *(FP32, FP32_8BIT, SPLIT, SPLIT_BF16, SPLIT_8BIT, MASTER),
        *(STOCHASTIC, STOCHASTIC_8BIT, NONE, NONE_BF16, FP16_MASTER),
    )
}


class Case(NamedTuple):
    """Somebody on parameters of some dtype."""

    kind: type[Contender]
    dtype: torch.dtype
    mode: Mode | None = None  # fastopt's

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def precision(self) -> str:
        if self.mode:
            return self.mode.name
        is_half = self.dtype.itemsize == 2
        adds = (is_half and self.kind.adds_to_halves) or self.kind.adds
        return SHORT[self.dtype] + adds

    def make(self, rule: Rule, params: list[Tensor]) -> Contender:
        if self.mode:
            rule = Rule(rule.optimizer, {**rule.flags, **self.mode.settings})
        return self.kind(rule, params)


def ours(*modes: Mode, kind: type[Contender] = Fastopt) -> list[Case]:
    return [Case(kind, mode.dtype, mode) for mode in modes]
