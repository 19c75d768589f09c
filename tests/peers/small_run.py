"""`experiments.improved` with a small encoder and decoder in the place of the ResNet: seconds instead of minutes."""

import csv
import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from experiments import prepare, processes
from experiments.run import run
from experiments.settings import Settings, complete, parse
from experiments.stages import resume
from jaxseg import checkpoint
from jaxseg.decoders import ImprovedDecoder
from jaxseg.layers import BatchNorm
from jaxseg.train import AXIS


class SmallEncoder(nn.Module):
    """One strided convolution with batch norm, under a ResNet's name."""

    kind: str
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (32, 32), strides=32, use_bias=False, dtype=self.dtype)(x)
        norm = BatchNorm(not train, axis_name=self.axis_name, dtype=self.dtype)
        return {32: nn.relu(norm(x))}


def make_decoder(num_classes, rate):
    return ImprovedDecoder(num_classes, widths=(8, 8, 8, 8, 8), dropout_rate=rate, axis_name=AXIS)


def write_folder(root, numbers, shape=lambda index: (32, 32), ignored=lambda index: 0.0):
    """Writes a data set of two classes, which differ in brightness, for `--dataset folder:ROOT`; returns its root.

    Args:
      root: where; made.
      numbers: split -> images.
      shape: place in the split -> (height, width).
      ignored: place in the split -> the share of its pixels that is 255.
    """
    rng = np.random.default_rng(0)
    for split, number in numbers.items():
        for part in ("img", "seg"):
            (root / split / part).mkdir(parents=True)
        for index in range(number):
            label = rng.integers(0, 2, shape(index), dtype=np.uint8)
            image = np.repeat(label[..., None] * 100, 3, -1) + rng.integers(0, 100, (*label.shape, 3), dtype=np.uint8)
            label[rng.random(label.shape) < ignored(index)] = 255
            Image.fromarray(image).save(root / split / "img" / f"{index}.png")
            Image.fromarray(label).save(root / split / "seg" / f"{index}.png")
    return root


def rows(workdir):
    """The rows of its metrics.csv so far."""
    path = workdir / "metrics.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def last_state(workdir):
    """The state that its last checkpoint holds."""
    prepare.ResNet = SmallEncoder
    values = json.loads((workdir / "config.json").read_text())["settings"]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    prepared = prepare.prepare(complete(Settings(**values | {"workdir": workdir}), "improved"), make_decoder)
    with checkpoint.open_checkpoints(workdir / "checkpoints") as manager:
        return resume(prepared, manager)[0]


def main(argv=None):
    """Runs it; returns the exit code."""
    prepare.ResNet = SmallEncoder
    return run(parse("improved", __doc__, argv), make_decoder)


if __name__ == "__main__":
    processes._SILENCE = 15  # tests/test_distributed.py kills one, and waits for it
    sys.exit(main())
