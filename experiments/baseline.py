"""Trains the report's baseline, first its decoder on a frozen encoder, then everything; evaluates and draws it."""

import sys

from experiments.memory import keep_freed_memory
from experiments.settings import parse


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    try:
        settings = parse("baseline", __doc__, argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep_freed_memory(may_restart=argv is None)
    # Imported only now: jax takes seconds, and --help must not wait for it.
    from experiments.prepare import make_baseline
    from experiments.run import run

    return run(settings, make_baseline)


if __name__ == "__main__":
    sys.exit(main())
