"""Timing of calls side by side in one process: functions of callables alone, which know nothing of artifacts."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Call = Callable[[], object]
Clock = Callable[[], int]  # nanoseconds
Samples = np.ndarray  # seconds of the timed runs of one call: rounds x runs in a round

_MOST_RUNS = 20  # of one call in one block: a block must be over before the machine's other work has changed
_LASTING = 0.02  # seconds: in a call as long as this, what is found in the caches at its start does not count
_TOLERANCE = 0.05  # a call is warm when it gets no faster by more than this share


def repeat(
    load: Callable[[], Mapping[str, Call]],
    loads: int = 6,
    seconds: float = 2.0,
    seed: int = 0,
    max_rounds: int = 300,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, list[Samples]]:
    """Load afresh `loads` times and interleave the calls each time; `seconds` are for all loads together.

    `load` gives the calls by name, made anew: where a runtime's buffers come to lie differs from load to load and
    moves the time by some percent, which no number of runs of one load would show. Returns, by name, what
    `interleave` gives for each load.
    """
    taken: dict[str, list[Samples]] = {}
    for count in range(loads):
        samples = interleave(load(), seconds / loads, seed + count, min_rounds=3, max_rounds=max_rounds, clock=clock)
        for name, rows in samples.items():
            taken.setdefault(name, []).append(rows)
    return taken


def interleave(
    calls: Mapping[str, Call],
    seconds: float = 2.0,
    seed: int = 0,
    min_rounds: int = 10,
    max_rounds: int = 1000,
    block: float = 0.005,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Samples]:
    """Time every call in short blocks that alternate in one process, in an order drawn anew for each round.

    Each call is warmed up until it gets no faster. In a round each call gets a block of about `block` seconds, at
    least one timed run; one more run goes before them, untimed, so that no call pays for the caches that another left
    behind (a call that lasts pays nothing worth it). Rounds go on for `seconds`, which are for all calls together
    without the warm-up, but not fewer than `min_rounds`, nor more than `max_rounds`. The garbage collector rests
    meanwhile. Returns seconds per run by call, rounds x runs: row i of every call was taken in the same moment, so
    ratios are formed by row (paired design: Georges et al., OOPSLA 2007; Kalibera and Jones, ISMM 2013). With
    `time.thread_time_ns` for `clock` calls that run in this thread alone cost what they cost the processor, however
    busy the machine is.
    """
    if not calls:
        raise ValueError("there is nothing to time")
    generator = np.random.default_rng(seed)
    with _no_collector():
        costs = {name: warm_up(call, seconds / (2 * len(calls)), clock) for name, call in calls.items()}
        taken: dict[str, list[list[float]]] = {name: [] for name in calls}
        start = time.perf_counter()
        for done in range(max(min_rounds, max_rounds)):
            if done >= min_rounds and time.perf_counter() - start > seconds:
                break
            for name in generator.permutation(list(calls)):
                runs = runs_in_block(costs[name], block)
                taken[name].append(_block(calls[name], runs, costs[name] < _LASTING, clock))
    return {name: np.array(rows) for name, rows in taken.items()}


def runs_in_block(cost: float, block: float) -> int:
    """How many runs of `cost` seconds are timed in a block of `block` seconds: at least 1."""
    return int(np.clip(round(block / max(cost, 1e-9)), 1, _MOST_RUNS))


def warm_up(call: Call, limit: float = 1.0, clock: Clock = time.perf_counter_ns) -> float:
    """Run `call` until it gets no faster; return the seconds of its fastest run.

    Windows of runs, each about a tenth of `limit` (seconds) long, are compared: the call is warm when two of them in
    a row have not brought the best time down by more than 5%. After `limit` it is taken as it is.
    """
    start = time.perf_counter()
    best = _once(call, clock)
    size = int(np.clip(limit / 10 / max(best, 1e-9), 1, 50))
    stable = 0
    while stable < 2 and time.perf_counter() - start < limit:
        fastest = min(_once(call, clock) for _ in range(size))
        stable = stable + 1 if fastest > best * (1 - _TOLERANCE) else 0
        best = min(best, fastest)
    return best


def _block(call: Call, runs: int, settle: bool, clock: Clock) -> list[float]:
    if settle:
        call()
    return [_once(call, clock) for _ in range(runs)]


def _once(call: Call, clock: Clock) -> float:
    start = clock()
    call()
    return (clock() - start) * 1e-9


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the garbage collector from running inside a timed call; it is left as it was found."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
