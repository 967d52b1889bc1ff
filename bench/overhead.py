"""Host overhead: how the time of a step grows with the number of tensors.

The slope leaves out what a step costs once. It includes the update of 64 elements that each tensor
has, which is small beside the work of finding them: an upper bound on the overhead.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import linear_regression

from .contenders import Rule, TorchFused
from .measure import Row, Skip, measure
from .workloads import many_small

COUNTS = (500, 1000, 2000, 4000)
OPERATION = "step"


@dataclass(frozen=True)
class Slope:
    """Time per step = ``fixed_us`` + ``us_per_tensor`` x tensors, by least squares on medians."""

    rule: str
    contender: str
    us_per_tensor: float
    fixed_us: float
    medians_us: dict[int, float]  # by number of tensors


def sweep(rule: Rule, rounds: int) -> Iterator[Slope | Skip]:
    """The slope of each contender on one rule, with fresh gradients each step."""
    medians: dict[str, dict[int, float]] = defaultdict(dict)
    for count in COUNTS:
        for result in measure(
            rule, many_small(count), rounds, [OPERATION], peers=[TorchFused], with_bound=False
        ):
            if isinstance(result, Row):
                medians[result.contender][count] = result.median_ns / 1e3
            else:
                yield result
    for contender, points in medians.items():
        slope, fixed = linear_regression(list(points), list(points.values()))
        yield Slope(rule.name, contender, round(slope, 4), round(fixed, 1), points)
