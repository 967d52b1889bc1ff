"""Host overhead: how the time of a step grows with the number of tensors.

The slope leaves out what a step costs once. It includes the update of 64 elements that each tensor
has, which is small beside the work of finding them: an upper bound on the overhead.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import linear_regression

from .contenders import Rule
from .measure import Row, Skip
from .workloads import Workload, many_small

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


def sweep(
    rule: Rule, measure: Callable[[Workload], Iterable[Row | Skip]], clock: str
) -> Iterator[Slope | Skip]:
    """The slope of each contender on one rule.

    Args:
        measure: the rows of a workload, of `OPERATION` alone.
        clock: which of them count.
    """
    medians: dict[str, dict[int, float]] = defaultdict(dict)
    for count in COUNTS:
        for result in measure(many_small(count)):
            if isinstance(result, Skip):
                yield result
            elif result.clock == clock:
                medians[result.contender][count] = result.median_ns / 1e3
    for contender, points in medians.items():
        slope, fixed = linear_regression(list(points), list(points.values()))
        yield Slope(rule.name, contender, round(slope, 4), round(fixed, 1), points)
