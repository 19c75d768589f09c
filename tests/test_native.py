"""Evaluation at each image's own size: the confusion matrix is that of the images one at a time, by NumPy."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments import prepare as preparing
from experiments import results, settings
from experiments.run import make_evaluate
from experiments.stop import Stop
from jaxseg import boundary, segmenter, train
from jaxseg.data import canvases, loader
from tests.peers import small_run

NUM_CLASSES = 3
# From an image's colours, averaged over a cell of 32x32, and those of the cells around it, to the classes.
KERNEL = np.random.default_rng(9).normal(0, 1, (3, 3, 3, NUM_CLASSES)).astype(np.float32)


class Cells(nn.Module):
    """Each cell's mean colour, made other than zero in the padding too; then a convolution that sees it."""

    @nn.compact
    def __call__(self, x, train=False):
        number, height, width, _ = x.shape
        cells = x.reshape(number, height // 32, 32, width // 32, 32, 3).mean((2, 4)) + 0.5
        return {32: nn.Conv(NUM_CLASSES, (3, 3), padding=1, use_bias=False, name="conv")(cells)}


class Enlarge(nn.Module):
    """Each pixel gets its cell's class."""

    def __call__(self, x, train=False, keys=None):
        return x.repeat(32, 1).repeat(32, 2)


MODEL, VARIABLES = segmenter.Segmenter(Cells(), Enlarge()), {"params": {"encoder": {"conv": {"kernel": KERNEL}}}}


def classify(image):
    """The definition: the image alone, normalised, padded with zeros to multiples of 32; (H, W) class indices."""
    height, width = image.shape[:2]
    rows, columns = -(-height // 32), -(-width // 32)
    x = np.zeros((32 * rows, 32 * columns, 3))
    x[:height, :width] = (image / 255 - segmenter.MEAN) / segmenter.STD
    cells = np.pad(x.reshape(rows, 32, columns, 32, 3).mean((1, 3)) + 0.5, ((1, 1), (1, 1), (0, 0)))
    logits = sum(cells[i : i + rows, j : j + columns] @ KERNEL[i, j] for i in range(3) for j in range(3))
    return logits.argmax(-1).repeat(32, 0).repeat(32, 1)[:height, :width]


class Source:
    """Images of one colour in each cell and more or less of it, and labels of their sizes, with ignored pixels."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.sizes = self.rng.integers(1, (97, 65), (self.rng.integers(1, 14), 2))
        self.items = [self.draw(*size) for size in self.sizes]

    def draw(self, height, width):
        cells = self.rng.integers(0, 256, (-(-height // 32), -(-width // 32), 3))
        image = cells.repeat(32, 0).repeat(32, 1)[:height, :width] * self.rng.uniform(0.8, 1, (height, width, 1))
        label = self.rng.choice([0, 1, 2, 255], (height, width))
        return {"image": image.astype(np.uint8), "label": label.astype(np.uint8), "name": "x"}

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def label_sizes(self):
        return self.sizes


def count_one_at_a_time(source):
    total = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for item in source.items:
        label, prediction = item["label"], classify(item["image"])
        there = label != 255
        np.add.at(total, (label[there], prediction[there]), 1)
    return total


@pytest.mark.parametrize(
    ("seed", "devices", "parts", "most"),
    [(0, 1, 1, 16), (1, 4, 1, 16), (2, 3, 1, 2), (3, 1, 3, 16), (4, 2, 2, 3), (5, 1, 1, 1)],
)
def test_every_image_counts_once_as_if_it_were_alone(monkeypatch, seed, devices, parts, most):
    monkeypatch.setattr(loader, "choose_canvases", functools.partial(canvases.choose_canvases, most=most))
    source, devices = Source(seed), jax.local_devices()[:devices]
    evaluate = train.make_evaluate(MODEL, NUM_CLASSES, devices, native=True)
    batch_size, total, shapes, valid = len(devices) * parts * (1 + seed % 3), 0, set(), 0
    for which in range(parts):
        options = {"image_size": None, "batch_size": batch_size, "part": (which, parts)}
        batches = list(loader.eval_batches(source, **options))
        shapes |= {batch["image"].shape for batch in batches}
        valid += sum(batch["valid"].sum() for batch in batches)
        total = total + evaluate(VARIABLES, batches)
    assert valid == len(source) and len(shapes) <= most
    np.testing.assert_array_equal(total, count_one_at_a_time(source))
    assert total.sum() == sum((item["label"] != 255).sum() for item in source.items)


def test_parts_of_a_native_batch_have_one_shape_and_every_image_once():
    source = Source(6)
    options = {"image_size": None, "batch_size": 4}
    whole = list(loader.eval_batches(source, **options))
    parts = [list(loader.eval_batches(source, **options, part=(which, 2))) for which in range(2)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert batch["image"].shape[:3] == batch["label"].shape
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), value)
        for k, index in enumerate(batch["index"]):
            item, (height, width) = source[index], batch["label_size"][k]
            assert (height, width) == item["label"].shape
            np.testing.assert_array_equal(batch["image"][k, :height, :width], item["image"])
            expected = np.full(batch["label"].shape[1:], 255)
            if batch["valid"][k]:
                expected[:height, :width] = item["label"]
            np.testing.assert_array_equal(batch["label"][k], expected)
    index, valid = (np.concatenate([batch[name] for batch in whole]) for name in ("index", "valid"))
    assert sorted(index[valid]) == list(range(len(source)))


def test_a_run_counts_and_predicts_each_image_as_if_it_were_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    sizes = ((32, 32), (33, 64), (30, 31))
    data = small_run.write_folder(
        tmp_path / "data", {"train": 4, "val": 3}, shape=lambda index: sizes[index % 3], ignored=lambda index: 0.1
    )
    argv = ["--dataset", f"folder:{data}", "--num-classes", "2", "--weights", "none", "--image-size", "32", "64"]
    argv += ["--batch-size", "4", "--workdir", str(tmp_path / "run"), "--eval-size", "native"]
    run = preparing.prepare(settings.parse("improved", "", argv), small_run.make_decoder)
    source, confusion, model = run.splits["val"], np.zeros((2, 2), np.int64), jax.jit(run.model.apply)
    for index, classes in enumerate(results.predict(run, run.variables, source)):
        item = source[index]
        np.testing.assert_array_equal(classes, model(run.variables, item["image"][None])[0].argmax(-1))
        there = item["label"] != 255
        np.add.at(confusion, (item["label"][there], classes[there]), 1)
    counted = make_evaluate(run, Stop(), boundary=True)(train.replicate(run.variables, run.devices), "val")
    np.testing.assert_array_equal(boundary.without_boundary(counted), confusion)
