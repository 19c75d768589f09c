"""Trains the report's improved model (batch norm, dropout, rotation), first its decoder, then everything."""

import sys

from experiments.start import start_training


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    return start_training("improved", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
