"""A person, or a cluster, that wants a run to stop."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from signal import SIGINT, SIGTERM, Signals, default_int_handler, getsignal
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


def end_on_ctrl_c(by_command: bool) -> None:
    """From here on Ctrl-C ends the process at once, with a line, but where a function of this module handles it.

    For commands that are to import jax: an exception that is raised within that becomes another one, or aborts.

    Args:
      by_command: whether the process is the command's own; otherwise nothing changes.
    """
    # Not where it is ignored, as in the background of a shell.
    if by_command and getsignal(SIGINT) is default_int_handler:
        set_handler(SIGINT, _end)


def _end(number: int, _: Any) -> None:
    os.write(2, b"\nstopped\n")
    os._exit(128 + number)


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing is to be saved."""


class _Interrupt:
    """A handler that raises; and remembers, for what is raised while Python cleans something up is lost."""

    asked: type[KeyboardInterrupt] | None = None

    def __call__(self, number: int, _: Any) -> None:
        self.asked = Terminated if number == SIGTERM else KeyboardInterrupt
        raise self.asked


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Within it SIGTERM interrupts, as Ctrl-C does: raises Terminated. What was lost `catch_signals` raises again."""
    interrupt, before = _Interrupt(), {SIGTERM: getsignal(SIGTERM)}
    if getsignal(SIGINT) in (default_int_handler, _end):
        before[SIGINT] = getsignal(SIGINT)
    for number in before:
        set_handler(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            set_handler(number, handler)


@contextlib.contextmanager
def catch_signals(agreement: Any = None) -> Iterator[Stop]:
    """Within it Ctrl-C and SIGTERM only ask the run to stop, the first time; a second one acts as ever."""
    stop = Stop(agreement=agreement)
    before: dict[Signals, Any] = {}

    def ask(number: int, _: Any) -> None:
        stop.ask(Signals(number))
        put_back()
        print(
            "\nstopping: saving what is trained, after the step that is computed or compiled now; once more to stop"
            " without saving",
            file=sys.stderr,
        )

    def put_back() -> None:
        for number, handler in before.items():
            set_handler(number, handler)

    for number in (SIGINT, SIGTERM):
        before[number] = set_handler(number, ask)
    try:
        for handler in before.values():
            if isinstance(handler, _Interrupt) and handler.asked:
                raise handler.asked
        yield stop
    finally:
        put_back()
