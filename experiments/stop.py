"""A person, or a cluster, that wants a run to stop."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Stop:
    """Whether a run was asked to stop, and by which signal."""

    signal: signal.Signals | None = None


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Within it Ctrl-C and SIGTERM only ask the run to stop, the first time; a second one acts as ever."""
    stop, before = Stop(), {}

    def ask(number: int, _: Any) -> None:
        stop.signal = signal.Signals(number)
        put_back()
        print("\nstopping: saving what is trained; once more to stop without", file=sys.stderr)

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        put_back()
