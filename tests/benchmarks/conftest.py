"""Times taken in turns, so that a busy moment of the machine meets every candidate alike."""

import time
from collections.abc import Callable
from statistics import median

import pytest


@pytest.fixture
def in_turns(benchmark):
    """Time several steps round by round; medians go into the report, each beside the step it is held against."""

    def measure(steps: dict[str, Callable[[], object]], base: str, rounds: int = 10, warmup: int = 2) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in steps}

        def one_round() -> None:
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
        medians = {name: 1000 * median(values[warmup:]) for name, values in times.items()}
        benchmark.extra_info["rows"] = [[name, value, "ms", base] for name, value in medians.items()]
        return medians

    return measure


@pytest.fixture
def report(benchmark):
    """Put a number of this test into the report: name, value, unit, what it is a ratio to."""

    def add(name: str, value: float, unit: str, ratio_to: str = "") -> None:
        benchmark.extra_info.setdefault("rows", []).append([name, value, unit, ratio_to])

    return add
