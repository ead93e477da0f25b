"""Work side by side, given back in order; and how much of it side by side is fastest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

WIDTHS = (1, 4, 16)  # how many things may be done at a time
TRIAL = {1: 32, 4: 128, 16: 128}  # things that show how fast a width is
FIRST, LOOK, SELDOM = 8, 1_024, 16_384  # things until it is asked whether another is faster
GAIN = 0.85  # of the time, at most, for another width: else the noise would choose


class Pace:
    """How many things to do at a time: finds out by trying, and looks again now and then.

    Whether threads help depends on the disk, on what of it is cached, and on who else uses it, so
    no number of milliseconds tells. But one who works all the time has nothing to wait for, and
    is not disturbed: where files are in memory, threads cost two to three times what they save.
    """

    def __init__(self) -> None:
        self.width = 1  # the fastest, as far as is known
        self.rest = FIRST  # things until others may be tried
        self.trials: list[int] = []  # widths that are being tried, the next one last
        self.costs: dict[int, float] = {}  # seconds for one thing, by width
        self.things, self.seconds, self.busy = 0, 0.0, 0.0  # since any of this changed

    def stretch(self) -> tuple[int, int]:
        """Return how many to do at a time, and for how many things at most."""
        width = self.trials[-1] if self.trials else self.width
        return width, (TRIAL[width] if self.trials else self.rest) - self.things

    def took(self, things: int, seconds: float, busy: float) -> None:
        """Learn how long some things took, and how much of that the caller's thread was at work."""
        self.things += things
        self.seconds += seconds
        self.busy += busy
        width, left = self.stretch()
        if left > 0:
            return
        if self.trials:
            self._tried(width, self.seconds / self.things)
        elif width > 1 or self.seconds > 1.5 * self.busy:
            self.trials, self.costs = list(reversed(WIDTHS)), {}
        else:
            self.rest = min(2 * self.rest, SELDOM)
        self.things, self.seconds, self.busy = 0, 0.0, 0.0

    def _tried(self, width: int, cost: float) -> None:
        """Take the result of a trial; after the last one, choose."""
        again = width in self.costs
        self.costs[width] = min(cost, self.costs.get(width, cost))
        self.trials.pop()
        if self.trials:
            return
        fastest = min(WIDTHS, key=self.costs.__getitem__)
        near = [width for width in WIDTHS if self.costs[width] < 2 * self.costs[fastest]]
        if len(near) > 1 and not again:
            self.trials = near  # once more: what is slow once may be noise
            return
        changed = self.costs[fastest] < GAIN * self.costs[self.width]
        self.width = fastest if changed else self.width
        self.rest = LOOK if changed else min(max(LOOK, 2 * self.rest), SELDOM)


def in_order(
    pool: Executor,
    work: Callable[[Any], Any],
    tasks: Iterable[Any],
    ahead: int,
    weigh: Callable[[Any], int] = lambda _: 1,
    done: Callable[[Any], bool] = lambda _: False,
) -> Iterator[Any]:
    """Yield work(task) for each task, in order, while the pool works on those that follow.

    Args:
        ahead: the most tasks, or the most weight, that is begun and not yielded yet.
        done: tells a task without work, which is yielded as it is if none waits before it.
    """
    begun: deque[tuple[Future[Any], int]] = deque()
    weight = 0
    for task in tasks:
        if not begun and done(task):
            yield task
            continue
        heavy = weigh(task)
        while begun and weight + heavy > ahead:
            future, light = begun.popleft()
            weight -= light
            yield future.result()
        begun.append((pool.submit(work, task), heavy))
        weight += heavy
    while begun:
        yield begun.popleft()[0].result()
