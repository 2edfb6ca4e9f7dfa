"""Steps timed in turns, so that a busy moment of the machine affects all of them."""

from __future__ import annotations

import time
from statistics import median

import pytest


@pytest.fixture
def in_turns(benchmark):
    """Time several steps round by round; their medians, in ms, go into the report."""

    def measure(steps, base, rounds=10, warmup=2):
        times = {name: [] for name in steps}

        def one_round():
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
        medians = {name: 1000 * median(values[warmup:]) for name, values in times.items()}
        benchmark.extra_info["rows"] = [[name, value, base] for name, value in medians.items()]

    return measure
