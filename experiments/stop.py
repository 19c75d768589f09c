"""A person, or a cluster, that wants a run to stop."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from signal import SIGINT, SIGTERM, Signals
from signal import signal as set_handler
from typing import Any


@dataclasses.dataclass
class Stop:
    """Whether a run was asked to stop.

    Attributes:
      signal: by which signal; of several processes, once all know of it: it changes in `poll` and `settle` only, which
        all of them must call alike.
      agreement: an `experiments.processes.Agreement`, or None where there is one process.
      asked: by which signal this process was asked.
    """

    signal: Signals | None = None
    agreement: Any = None
    asked: Signals | None = None

    def ask(self, number: Signals) -> None:
        """Asks, in the name of this process."""
        self.asked = number
        if self.agreement is None:
            self.signal = number

    def poll(self, due: bool = False) -> bool:
        """Whether the run is asked to stop, or a checkpoint was `due` in any process; never waits for a device."""
        if self.agreement is None:
            return self.signal is not None or due
        # No signal that is caught has the number 1.
        return self._learn(self.agreement.late(int(self.asked or due)))

    def until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes them on until the run is asked to stop."""
        for batch in batches:
            self.poll()
            if self.signal is not None:
                return
            yield batch

    def settle(self) -> bool:
        """Whether the run is asked to stop; waits until all processes have said."""
        if self.agreement is not None:
            self._learn(self.agreement.now(int(self.asked or 0)))
        return self.signal is not None

    def _learn(self, number: int) -> bool:
        if number > 1:
            self.signal = Signals(number)
        return number > 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing is to be saved."""


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM interrupts, as Ctrl-C does: raises Terminated."""

    def interrupt(number: int, _: Any) -> None:
        raise Terminated

    before = set_handler(SIGTERM, interrupt)
    try:
        yield
    finally:
        set_handler(SIGTERM, before)


@contextlib.contextmanager
def catch_signals(agreement: Any = None) -> Iterator[Stop]:
    """Within it Ctrl-C and SIGTERM only ask the run to stop, the first time; a second one acts as ever."""
    stop = Stop(agreement=agreement)
    before: dict[Signals, Any] = {}

    def ask(number: int, _: Any) -> None:
        stop.ask(Signals(number))
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
