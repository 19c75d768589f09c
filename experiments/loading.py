"""Whether reading images keeps ahead of training on them: JPEG and PNG files against the steps of both stages."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import works

# More batches than the loader has ready: whoever takes so many waits for the files from then on.
_READY = 8


def measure_loading(load: works.Load, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measures, in turns and in one process, reading alone, training alone and training on what is read.

    Args:
      load: what is worked on.
      rounds: of each; the medians count.
      steps: batches in a round.

    Returns:
      For each stage and kind of file {"work", "files", "read_images_per_s", "step_images_per_s", "both_images_per_s",
      "ratio": reading over training, each alone, "kept": both over training alone}.
    """
    rows = []
    with contextlib.ExitStack() as stack, tqdm(total=4 * rounds, desc="loading", leave=False, disable=None) as bar:
        given = stack.enter_context(works.open_batches(dataclasses.replace(load, loader=False), "stage2"))
        files = {}
        for name, suffix in (("JPEG", "jpg"), ("PNG", "png")):
            from_files = dataclasses.replace(load, loader=True, suffix=suffix)
            files[name] = stack.enter_context(works.open_batches(from_files, "stage2"))
        for work in ("stage1", "stage2"):
            source = _Switch(given)
            work_on = works.prepare(work, load, source)
            work_on(1)
            for name, read in files.items():
                times: dict[str, list[float]] = {"read": [], "step": [], "both": []}
                for _ in range(rounds):
                    source.batches = given
                    # What was under way to the device before is used up, and files are read ahead once more.
                    work_on(2)
                    times["step"].append(_seconds(work_on, steps))
                    _take(read, _READY)
                    times["read"].append(_seconds(_take, read, steps))
                    source.batches = read
                    work_on(2)
                    times["both"].append(_seconds(work_on, steps))
                    bar.update()
                speeds = {key: steps * load.batch_size / statistics.median(seconds) for key, seconds in times.items()}
                row = {f"{key}_images_per_s": speed for key, speed in speeds.items()}
                shares = {"ratio": speeds["read"] / speeds["step"], "kept": speeds["both"] / speeds["step"]}
                rows.append({"work": work, "files": name, **row, **shares})
    return rows


class _Switch:
    """An endless iterator over `batches`, which may be others from one moment to the next."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]):
        self.batches = batches

    def __iter__(self) -> "_Switch":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self.batches)


def _take(batches: Iterator[dict[str, np.ndarray]], number: int) -> None:
    for _ in range(number):
        next(batches)


def _seconds(work: Callable[..., None], *args: Any) -> float:
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began
