"""The frozen encoder's features of the training images, computed once for all epochs of a stage."""

import math
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.prepare import Run
from experiments.stop import Stop
from jaxseg import train
from jaxseg.data import loader

# Bytes that are kept in memory; what is larger goes into a file.
_IN_MEMORY = 2**30


def compute_features(run: Run, number: int, variables: Any, stop: Stop) -> np.ndarray | None:
    """What the frozen encoder gives for every training image, if the stage sees each image more than once, unchanged.

    Args:
      run: the run.
      number: the stage's.
      variables: {'params', 'batch_stats'} on the devices.
      stop: asked after each batch.

    Returns:
      (images, height, width, channels) in the order of the training split, in memory or in a file without a name that
      is gone with the process; None where they are of no use, do not fit on the disk, or it was asked to stop.
    """
    settings, stage = run.settings, run.stages[number]
    if not (settings.cache_features and stage.freeze_encoder) or stage.epochs < 2:
        return None
    if stage.max_degrees or stage.flip or any(stage.jitter) or settings.augment != "resize":
        return None
    if run.processes.number > 1:
        return None
    sizes: dict[str, Any] = {"image_size": settings.image_size, "batch_size": settings.batch_size}
    batches = loader.eval_batches(run.splits["train"], **sizes)
    image = jax.ShapeDtypeStruct((1, *settings.image_size, 3), np.uint8)
    one = jax.eval_shape(lambda image: train.encode_step(variables, {"image": image}, model=run.model), image)
    shape = (len(run.splits["train"]), *one.shape[1:])
    size = math.prod(shape) * one.dtype.itemsize
    where = "in memory" if size <= _IN_MEMORY else f"in a temporary file in {settings.workdir}"
    print(
        f"{stage.name}: the encoder's features of the {shape[0]} training images are computed once, {size / 2**20:.0f}"
        f" MiB {where} (--no-cache-features: in every epoch)"
    )
    encoded = train.make_encode(run.model, run.devices)(variables, stop.until_stopped(batches))
    bar = tqdm(encoded, "features", -(-shape[0] // settings.batch_size), leave=False, unit="batch", disable=None)
    try:
        features = _keep(_first(bar, shape[0]), shape, one.dtype, settings.workdir if size > _IN_MEMORY else None)
    except OSError as error:
        print(f"warning: the features cannot be kept ({error}): they are computed in every epoch", file=sys.stderr)
        return None
    return features if stop.signal is None else None


def _first(batches: Iterable[np.ndarray], number: int) -> Iterator[np.ndarray]:
    """Cuts off the copies that fill the last batch up."""
    for batch in batches:
        yield batch[:number]
        number -= len(batch)


def _keep(
    parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, folder: pathlib.Path | None
) -> np.ndarray:
    """Puts arrays one behind the other: in memory, or in a file in `folder`."""
    if folder is None:
        kept, place = np.zeros(shape, dtype), 0
        for part in parts:
            kept[place : place + len(part)] = part
            place += len(part)
        return kept
    # Written, not mapped, until it is whole: where a disk is full, a map would end the process.
    with tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            file.write(part.tobytes())
        file.truncate(math.prod(shape) * dtype.itemsize)
        file.flush()
        return np.memmap(file, dtype, "r", shape=shape)
