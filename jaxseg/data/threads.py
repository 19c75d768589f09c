"""Work in threads whose results come in order. Decoding images lets go of Python's lock."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """Gives function(item) for each item, in order; a few are computed ahead, not all as a pool's `map` would.

    Args:
      function: called in threads.
      items: taken from the caller's thread.
      workers: threads; as many as there are processors, 16 at most, if None.

    Raises:
      What the function raises, where its result would have come.
    """
    workers = workers or min(os.cpu_count() or 1, 16)
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
