"""Work side by side, given back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any


def in_order(
    pool: Executor,
    work: Callable[[Any], Any],
    tasks: Iterable[Any],
    ahead: int,
    weigh: Callable[[Any], int] = lambda _: 1,
) -> Iterator[Any]:
    """Yield work(task) for each task, in order, while the pool works on those that follow.

    Args:
        ahead: the most tasks, or the most weight, that is begun and not yielded yet.
    """
    begun: deque[tuple[Future[Any], int]] = deque()
    weight = 0
    for task in tasks:
        heavy = weigh(task)
        while begun and weight + heavy > ahead:
            future, light = begun.popleft()
            weight -= light
            yield future.result()
        begun.append((pool.submit(work, task), heavy))
        weight += heavy
    while begun:
        yield begun.popleft()[0].result()
