"""Prints the seconds from a command to its first training step: `python -m tests.peers.start_up [--data-dir DATA ...]`.

The command is `experiments.baseline` with these options; first with no compiled program kept, then with those that the
first one left. Prepare the data before.
"""

import os
import subprocess
import sys
import tempfile
import time


def run_to_first_step() -> None:
    """Does what the command does, and ends the process when the first step is done."""
    from experiments import baseline
    from experiments.memory import collecting_nothing_imported, keep_freed_memory

    # As the command does. What is replaced below needs jax, which takes long to import: not twice.
    keep_freed_memory(may_restart=True)
    with collecting_nothing_imported():
        from jaxseg import train

    def first_step_done(epoch, step, metrics, index):
        float(metrics["loss"])
        print(f"first step after {time.time() - float(os.environ['BEGAN']):.1f} s", flush=True)
        os._exit(0)

    train._step_done = first_step_done
    sys.exit(baseline.main())


def main(argv: list[str]) -> None:
    """Starts the command twice."""
    with tempfile.TemporaryDirectory() as folder:
        for kept in ("nothing is kept", "programs are kept"):
            environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "BEGAN": str(time.time())}
            command = [sys.executable, "-m", "tests.peers.start_up", *argv, "--workdir", f"{folder}/{kept}"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(f"{kept}: {done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr}")


if __name__ == "__main__":
    run_to_first_step() if "BEGAN" in os.environ else main(sys.argv[1:])
