"""Trains the report's improved model (batch norm, dropout, rotation), first its decoder, then everything."""

import sys

from experiments.memory import keep_freed_memory


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    # It may start the program again, and so comes before what takes time, but not to explain the options.
    keep_freed_memory(may_restart=argv is None and not {"-h", "--help"} & set(sys.argv))
    from experiments.settings import parse

    try:
        settings = parse("improved", __doc__, argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Imported only now: jax takes seconds, and --help must not wait for it.
    from experiments.prepare import make_improved
    from experiments.run import run

    return run(settings, make_improved)


if __name__ == "__main__":
    sys.exit(main())
