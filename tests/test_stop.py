"""The first signal asks, the second acts."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.stop import Terminated, catch_signals, interrupted_by_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number, capsys):
    before = signal.getsignal(number)
    with catch_signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal is number
        assert "once more" in capsys.readouterr().err
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    # A worker of pytest-xdist ignores Ctrl-C, and what was before is what comes back.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), catch_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_interrupts_where_nothing_is_to_be_saved():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), interrupted_by_signals():
        with catch_signals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal is signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


class Interrupting:
    """Raises, and the interruption is lost, as that of any `__del__` is."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interruption_that_was_lost_comes_before_the_training(number, kind):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupted_by_signals():
            Interrupting(number)
            with pytest.raises(kind) as raised, catch_signals():
                pytest.fail("it went on")
            assert raised.type is kind
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        # What was not asked within is not told.
        with interrupted_by_signals(), catch_signals() as stop:
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


ENDING = """
import os, signal, sys
from experiments.stop import end_on_ctrl_c, interrupted_by_signals

signal.signal(signal.SIGINT, getattr(signal, sys.argv[2]))
end_on_ctrl_c(by_command=sys.argv[1] == "command")
try:
    with interrupted_by_signals():
        os.kill(os.getpid(), signal.SIGINT)
    print("ignored")
except KeyboardInterrupt:
    print("interrupted", flush=True)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("as ever")
"""


@pytest.mark.parametrize(
    ("options", "printed", "said", "code"),
    [
        (("command", "default_int_handler"), "interrupted\n", "\nstopped\n", 130),
        (("function", "default_int_handler"), "interrupted\nas ever\n", "", 0),
        (("command", "SIG_IGN"), "ignored\n", "", 0),
    ],
)
def test_ctrl_c_ends_a_command_at_once_but_where_it_is_handled(options, printed, said, code):
    command = [sys.executable, "-c", ENDING, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == (printed, said, code)


def test_without_a_signal_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with catch_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Late:
    """An agreement of this process with itself, two calls later."""

    def __init__(self):
        self.pending = [0, 0]

    def late(self, number):
        self.pending.append(number)
        return self.pending.pop(0)

    def now(self, number):
        self.pending = [0, 0]
        return number


def test_with_others_it_stops_when_all_know():
    with catch_signals(Late()) as stop:
        assert not stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        assert [stop.poll(), stop.poll(), stop.signal] == [False, False, None]
        assert stop.poll() and stop.signal is signal.SIGTERM
        # What was agreed on stays so.
        assert stop.settle() and stop.signal is signal.SIGTERM


def test_with_others_a_checkpoint_that_is_due_stops_nothing():
    with catch_signals(Late()) as stop:
        assert [stop.poll(due=True), stop.poll(), stop.poll(), stop.poll()] == [False, False, True, False]
        assert not stop.settle() and stop.signal is None
        stop.poll(due=True)
        # All are saving now: what was due before is forgotten.
        assert not stop.settle() and not any(stop.poll() for _ in range(4))
        stop.ask(signal.SIGINT)
        assert stop.signal is None and stop.settle() and stop.signal is signal.SIGINT
