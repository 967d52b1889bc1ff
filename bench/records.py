"""What a run of the benchmarks found, as records in a JSON file; all tables and pictures are made
from these.

A `Timing` has every sample, not only their median: the samples of a group of contenders, who took
turns, belong together by round, so that any two can be compared as `ratio` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

SCHEMA = 2
OURS, BOUND, COPY = "fastopt", "bound", "copy"


@dataclass(frozen=True)
class Timing:
    """What one contender took for one operation."""

    group: int  # the contenders of a group took turns on the same gradients
    rule: str  # an optimizer class with its flags, as "SGD(momentum=0.9)"
    workload: str
    tensors: int
    elements: int
    operation: str  # "step", "clip + step" or "unscale + clip + step"
    clock: str  # "wall", "host" or "device"
    contender: str
    precision: str  # fastopt's mode, or the dtype of a peer's parameters
    samples_ns: list[int]
    needed_bytes: int  # the least that must move for this, with these states at this precision
    working_set_bytes: int
    regime: str  # where the working set is: "cache", "memory", or "between" them
    own_process: bool = False

    @property
    def median_ns(self) -> float:
        return median(self.samples_ns)

    @property
    def bytes_per_element(self) -> float:
        return self.needed_bytes / self.elements

    @property
    def gb_per_s(self) -> float:
        return self.needed_bytes / self.median_ns


@dataclass(frozen=True)
class Slope:
    """Time of a step = ``fixed_us`` + ``us_per_tensor`` x tensors, by least squares on medians."""

    rule: str
    contender: str
    precision: str
    gradients: str  # "kept" where they are from step to step, "fresh" as after a backward pass
    clock: str
    us_per_tensor: float
    fixed_us: float
    medians_us: dict[str, float]  # by number of tensors


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory per parameter, of the storages that are there after a step."""

    workload: str
    contender: str
    precision: str
    parameter: float
    master: float
    states: float
    total: float  # of these three
    gradient: float


@dataclass(frozen=True)
class FirstStep:
    """Seconds that a process's first step took."""

    rule: str
    cache: str  # Triton's: "empty" or "warm"
    seconds: float


@dataclass(frozen=True)
class Skip:
    """A contender that did not run, and why."""

    contender: str
    case: str  # what it was to do, see `case_of`
    reason: str
    crashed: bool = False  # it raised, where others are not there or not able


@dataclass(frozen=True)
class Failure:
    """A measurement that raised."""

    job: str
    error: str


@dataclass
class Results:
    """One run.

    Args:
        run: what it was run on and with: date, commit, command, machine, gpu, versions, rounds,
            threads, used_by_others (the part of the CPU time that other processes took; None until
            the run is over).
    """

    run: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    overhead: list[Slope] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    startup: list[FirstStep] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def add(self, record: Any) -> None:
        """Puts a record where it belongs."""
        getattr(self, _LISTS[type(record)]).append(record)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever is killed meanwhile leaves the file as it was.
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises:
        ValueError: the file is not one of these.
        """
        try:
            saved = json.loads(path.read_text())
            if saved.pop("schema") != SCHEMA:
                raise ValueError
            lists = {
                name: [kind(**record) for record in saved.pop(name)]
                for kind, name in _LISTS.items()
            }
            return cls(**saved, **lists)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path} has no results of `python -m bench run` (schema {SCHEMA}): measure again"
            ) from None

    def groups(self) -> Iterator[list[Timing]]:
        """The timings of those who took turns, by one clock, in the order of measurement."""
        found: dict[tuple[int, str], list[Timing]] = {}
        for timing in self.timings:
            found.setdefault((timing.group, timing.clock), []).append(timing)
        yield from found.values()


def ratio(timing: Timing, base: Timing) -> float:
    """How many times longer one took than another of its group: the median over the rounds, in
    each of which both times were taken a moment apart."""
    return median(ratios(timing, base))


def ratios(timing: Timing, base: Timing) -> list[float]:
    """Of every round."""
    if (timing.group, timing.clock) != (base.group, base.clock):
        raise ValueError("only those who took turns can be compared")
    return [a / b for a, b in zip(timing.samples_ns, base.samples_ns, strict=True)]


def case_of(rule: str, workload: str, precision: str, operation: str = "") -> str:
    """What a `Skip` says; without an operation it was for all of them."""
    return ", ".join(filter(None, (rule, workload, precision, operation)))


#: The mode of fastopt's whose precision is that of a peer, or the next better one.
_SAME = {
    "fp32": "fp32",
    "fp32+8bit": "fp32+8bit",
    "bf16": "none+bf16",
    "bf16+8bit": "split+8bit",
    "bf16+fp32 states": "none",
    "bf16+kahan": "split+bf16",
    "bf16+stochastic": "stochastic",
    "bf16+fp32 master": "split",
    "fp16+fp32 master": "fp16-master",
}


def counterpart(peer: Timing, group: list[Timing]) -> Timing | None:
    """fastopt's timing that a peer of the same group is to be compared with: of the same precision,
    else the group's first."""
    ours = [timing for timing in group if timing.contender == OURS]
    same = [timing for timing in ours if timing.precision == _SAME.get(peer.precision)]
    return next(iter(same + ours), None)


def bound_of(timing: Timing, group: list[Timing]) -> Timing | None:
    """What the memory allowed in the same run: at the same precision, else at another."""
    limits = [other for other in group if other.contender in (BOUND, COPY)]
    same = [other for other in limits if other.precision == timing.precision]
    return next(iter(same + limits), None)


def part_of_bound(timing: Timing, group: list[Timing]) -> float | None:
    """The speed, in bytes that are needed, as a part of that of the bound."""
    limit = bound_of(timing, group)
    if limit is None or limit is timing:
        return None
    return ratio(limit, timing) * timing.needed_bytes / limit.needed_bytes


_LISTS = {
    Timing: "timings",
    Slope: "overhead",
    Footprint: "footprints",
    FirstStep: "startup",
    Skip: "skipped",
    Failure: "failed",
}
