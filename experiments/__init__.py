"""The commands: each module is one experiment, run with `python -m experiments.NAME`."""
