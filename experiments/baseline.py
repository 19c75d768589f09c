"""Trains the report's baseline, first its decoder on a frozen encoder, then everything; evaluates and draws it."""

import sys

from experiments.start import start_training


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    return start_training("baseline", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
