"""Host overhead: how the time of a step grows with the number of tensors.

The slope leaves out what a step costs once. It includes the update of 64 elements that each tensor
has, which is small beside the work of finding them: an upper bound on the overhead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from statistics import linear_regression

from .clocks import HOST
from .measure import Group, measure
from .records import Skip, Slope
from .turns import STEP
from .workloads import many_small

COUNTS = (500, 1000, 2000, 4000)


def sweep(group: Group, fresh: bool) -> Iterator[Slope | Skip]:
    """The slope of each contender of a group, whose workload does not matter.

    Args:
        fresh: whether each step gets new gradients, as after ``zero_grad``.
    """
    medians: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    skips: dict[str, Skip] = {}
    for count in COUNTS:
        steps = replace(
            group,
            workload=many_small(count),
            operations=[STEP],
            fresh_gradients=fresh,
            with_bound=False,
        )
        for result in measure(steps):
            if isinstance(result, Skip):
                skips[result.contender] = result
            elif result.clock == HOST or group.device.type == "cpu":
                who = result.contender, result.precision, result.clock
                medians[who][str(count)] = result.median_ns / 1e3
    yield from skips.values()
    for (contender, precision, clock), points in medians.items():
        if len(points) == len(COUNTS):
            slope, fixed = linear_regression(COUNTS, list(points.values()))
            yield Slope(
                rule=group.rule.name,
                contender=contender,
                precision=precision,
                gradients="fresh" if fresh else "kept",
                clock=clock,
                us_per_tensor=round(slope, 4),
                fixed_us=round(fixed, 1),
                medians_us=points,
            )
