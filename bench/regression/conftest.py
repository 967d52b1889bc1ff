"""How benchmarks are timed, and what a saved result says of where it was made."""

import gc
from collections.abc import Callable
from statistics import quantiles
from time import perf_counter
from typing import Any

import pytest
import torch

from bench import machine

ROUNDS, WARMUP = 11, 3


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Not the plugin's own, which names the host."""
    return {"cpu": machine.cpu(), "cores": machine.describe()["cores"], **machine.versions()}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, str]:
    return {"id": machine.commit()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Times of more depend on who else is using the machine."""
    torch.set_num_threads(1)


Run = Callable[[], object]


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """Times a run: ``timed(run, name, reference, prepare)``.

    Each round calls ``prepare`` and the reference, which has that name, and then ``prepare`` and
    ``run``. The ratio of their times is that of a moment: where another process slows the machine
    for a while, it slows both.
    """

    def measure(run: Run, name: str, reference: Run, prepare: Run = lambda: None) -> None:
        seconds = []

        def setup() -> None:
            prepare()
            start = perf_counter()
            reference()
            seconds.append(perf_counter() - start)
            prepare()

        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(run, setup=setup, rounds=ROUNDS, warmup_rounds=WARMUP)
        finally:
            gc.enable()
        if benchmark.stats is None:  # with --benchmark-disable
            return
        pairs = zip(benchmark.stats.stats.data, seconds[WARMUP:], strict=True)
        low, median, high = quantiles([own / other for own, other in pairs], method="inclusive")
        benchmark.extra_info.update(
            reference=name, ratio=round(median, 3), quartiles=[round(low, 3), round(high, 3)]
        )

    return measure
