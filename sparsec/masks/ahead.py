"""Chunks of rows computed ahead, by as many threads as there are processors.

This file decides how many chunks are under way at a time, so that memory stays bounded; results come in order, and are
those of one thread. numpy works outside the interpreter's lock, so threads pay. It must not know what is computed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# More would hold more chunks in memory than they save time.
_MOST_THREADS = 8


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of each item, in their order."""
    waiting = iter(items)
    first = list(islice(waiting, 2))
    if len(first) < 2 or (threads := min(_processors(), _MOST_THREADS)) < 2:
        yield from map(work, chain(first, waiting))
        return
    # A pool of its own: nothing is left behind for a process that is forked later.
    pool = ThreadPoolExecutor(threads, "sparsec-rows")
    try:
        under_way: deque[Future[Result]] = deque()
        for item in chain(first, waiting):
            under_way.append(pool.submit(work, item))
            if len(under_way) > threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
