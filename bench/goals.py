"""The figures that were set as goals, of a CPU with few cores and of an H200, from results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .clocks import DEVICE, WALL
from .contenders import Fastopt, FastoptTorchScaler
from .modes import MODES
from .peers import BitsAndBytes8Bit, FlashOptim, MastersByHand, TorchAO, TorchFused
from .records import COPY, OURS, Results, Timing, part_of_bound, ratio
from .startup import EMPTY, WARM
from .turns import CLIP, STEP, UNSCALE

RULE = "AdamW"
GPT2, BILLION = "gpt2", "tinyllama-1.1b"


@dataclass(frozen=True)
class Goal:
    """A figure to reach; ``found`` is None where it was not measured."""

    case: str
    what: str
    bound: float
    at_least: bool
    found: float | None

    @property
    def reached(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.bound if self.at_least else self.found <= self.bound


def of(results: Results) -> Iterator[Goal]:
    on_gpu = bool(results.run["gpu"])
    found = Found(results)
    yield from of_gpu(found) if on_gpu else of_cpu(found)


class Found:
    """Looks up results; a part of a workload is not the workload."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def groups(
        self, workload: str, operation: str, clock: str, rule: str = RULE
    ) -> Iterator[list[Timing]]:
        for group in self.results.groups():
            first = group[0]
            wanted = (workload, operation, clock, rule)
            if (first.workload, first.operation, first.clock, first.rule) == wanted:
                yield group

    def ratio(
        self,
        workload: str,
        operation: str,
        clock: str,
        peer: tuple[str, str],
        ours: tuple[str, str] = (OURS, "fp32"),
    ) -> float | None:
        """A peer's time divided by fastopt's, both given with their precisions."""
        for group in self.groups(workload, operation, clock):
            by = {(timing.contender, timing.precision): timing for timing in group}
            if peer in by and ours in by:
                return ratio(by[peer], by[ours])
        return None

    def of_bound(
        self,
        workload: str,
        operation: str,
        clock: str,
        precision: str,
        rule: str = RULE,
    ) -> float | None:
        for group in self.groups(workload, operation, clock, rule):
            for timing in group:
                if (timing.contender, timing.precision) == (OURS, precision):
                    return part_of_bound(timing, group)
        return None

    def slowest(self, field: str, gradients: str) -> float | None:
        """Of the rules' host times."""
        slopes = [
            getattr(slope, field)
            for slope in self.results.overhead
            if slope.contender == OURS and slope.gradients == gradients
        ]
        return max(slopes, default=None)


def least(case: str, what: str, bound: float, found: float | None) -> Goal:
    return Goal(case, what, bound, at_least=True, found=found)


def most(case: str, what: str, bound: float, found: float | None) -> Goal:
    return Goal(case, what, bound, at_least=False, found=found)


def of_cpu(found: Found) -> Iterator[Goal]:
    fused = TorchFused.name, "fp32"
    split, eight = (OURS, "split"), (OURS, "split+8bit")
    case = "AdamW, GPT-2, split"
    by_hand = MastersByHand.name, "bf16" + MastersByHand.adds
    for peer, bound in ((by_hand, 1.5), (fused, 1.0)):
        value = found.ratio(GPT2, STEP, WALL, peer, split)
        yield least(case, f"x {peer[0]} {peer[1]}", bound, value)
    case = "AdamW, GPT-2, split+8bit"
    value = found.ratio(GPT2, STEP, WALL, fused, eight)
    yield most(case, f"time, of {fused[0]} fp32", 0.75, value and 1 / value)
    for kind in (BitsAndBytes8Bit, TorchAO):
        for dtype in ("fp32", "bf16"):
            value = found.ratio(GPT2, STEP, WALL, (kind.name, dtype + kind.adds), eight)
            yield least(case, f"x {kind.name} {dtype}", 40, value)
    for name, bound in ((Fastopt.name, 1.45), (FastoptTorchScaler.name, 1.2)):
        value = found.ratio(GPT2, UNSCALE, WALL, fused, (name, "fp32"))
        yield least(f"{name}, GPT-2, {UNSCALE}", "x torch's three calls", bound, value)
    value = found.ratio("small-2000", STEP, WALL, fused)
    yield least("AdamW, 2000 x 64", "x torch fused", 40, value)
    for gradients, bound in (("kept", 0.10), ("fresh", 0.15)):
        value = found.slowest("us_per_tensor", gradients)
        yield most(f"Host time, slowest rule, {gradients} gradients", "us a tensor", bound, value)
    rules = dict.fromkeys(timing.rule for timing in found.results.timings)
    for rule in rules:
        for mode in MODES:
            value = found.of_bound(GPT2, STEP, WALL, mode, rule)
            yield least(f"{rule}, GPT-2, {mode}", "step: of the bound", 0.95, value)


def of_gpu(found: Found) -> Iterator[Goal]:
    """What an H200 is to reach."""
    fused32, fused16 = (TorchFused.name, "fp32"), (TorchFused.name, "bf16")
    case = "AdamW, 1.1B split"
    value = found.of_bound(BILLION, STEP, DEVICE, "split")
    yield least(case, f"step: of the {COPY}'s bandwidth", 0.92, value)
    # torch's bf16 states leave it half the bytes of a split master with fp32 states.
    for mode, fused in (("fp32", fused32), ("none+bf16", fused16)):
        case, ours = f"AdamW, 1.1B {mode}", (OURS, mode)
        value = found.of_bound(BILLION, STEP, DEVICE, mode)
        yield least(case, f"step: of the {COPY}'s bandwidth", 0.92, value)
        for operation, bound in ((STEP, 1.1), (CLIP, 1.4)):
            value = found.ratio(BILLION, operation, DEVICE, fused, ours)
            yield least(case, f"{operation}: torch fused x", bound, value)
    case, eight = "AdamW, 1.1B split+8bit", (OURS, "split+8bit")
    value = found.ratio(BILLION, STEP, DEVICE, fused32, eight)
    yield least(case, "step: torch fused fp32 x", 1.8, value)
    flash = FlashOptim.name, "bf16" + FlashOptim.adds
    yield least(case, "step: flashoptim x", 1.5, found.ratio(BILLION, STEP, DEVICE, flash, eight))
    for clock in (DEVICE, WALL):
        value = found.ratio(GPT2, CLIP, clock, fused32)
        yield least("AdamW, GPT-2", f"clip + step, {clock} time: torch fused x", 2, value)
    for operation in (STEP, CLIP):
        value = found.ratio("small-1000x1000", operation, WALL, fused32)
        yield least("AdamW, 1000 x 1000", f"{operation}, wall time: torch fused x", 5, value)
    for field, what, bound in (
        ("us_per_tensor", "us a tensor", 0.3),
        ("fixed_us", "us besides", 50),
    ):
        yield most("Host time, slowest rule", what, bound, found.slowest(field, "fresh"))
    for cache, bound in ((EMPTY, 3.0), (WARM, 0.5)):
        seconds = [step.seconds for step in found.results.startup if step.cache == cache]
        value = max(seconds, default=None)
        yield most("First step, slowest rule", f"{cache} cache: seconds", bound, value)
