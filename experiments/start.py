"""How `baseline` and `improved` start: from the command line to the run, soon."""

import contextlib
import sys

from experiments.memory import collecting_nothing_imported, keep_freed_memory
from experiments.stop import end_on_ctrl_c


def start_training(experiment: str, purpose: str, argv: list[str] | None) -> int:
    """Trains one model, or explains the options.

    Args:
      experiment: 'baseline' or 'improved'.
      purpose: what `--help` says first.
      argv: the arguments, or None for the command line's.

    Returns:
      The exit code.
    """
    by_command = argv is None
    # It may start the program again, and so comes before what takes time, but not to explain the options.
    keep_freed_memory(may_restart=by_command and not {"-h", "--help"} & set(sys.argv))
    end_on_ctrl_c(by_command)
    from experiments.settings import parse

    try:
        settings = parse(experiment, purpose, argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Only now: jax takes seconds to import, and --help must not wait for it.
    with collecting_nothing_imported() if by_command else contextlib.nullcontext():
        from experiments.prepare import DECODERS
        from experiments.run import run
    return run(settings, DECODERS[experiment])
