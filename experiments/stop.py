"""A person, or a cluster, that wants a run to stop."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from signal import SIGINT, SIGTERM, Signals
from signal import signal as set_handler
from typing import Any


@dataclasses.dataclass
class Stop:
    """Whether a run was asked to stop, and by which signal."""

    signal: Signals | None = None


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Within it Ctrl-C and SIGTERM only ask the run to stop, the first time; a second one acts as ever."""
    stop, before = Stop(), {}

    def ask(number: int, _: Any) -> None:
        stop.signal = Signals(number)
        put_back()
        print("\nstopping: saving what is trained; once more to stop without", file=sys.stderr)

    def put_back() -> None:
        for number, handler in before.items():
            set_handler(number, handler)

    for number in (SIGINT, SIGTERM):
        before[number] = set_handler(number, ask)
    try:
        yield stop
    finally:
        put_back()
