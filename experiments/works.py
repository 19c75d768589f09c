"""The pieces of work that the benchmark measures, as jaxseg does them: steps of training, validation, inference."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from jaxseg import initializers, train
from jaxseg.data import folder, loader
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.layers import BatchNorm, Conv, ConvTranspose
from jaxseg.optimizer import make_optimizer
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

WORKS = ("stage1", "stage1-cached", "stage2", "validation", "inference")


@dataclasses.dataclass(frozen=True)
class Load:
    """What is worked on; the fields are options of `experiments.benchmark`, which explains them."""

    model: str = "baseline"
    encoder: str = "resnet18"
    image_size: tuple[int, int] = (192, 224)
    batch_size: int = 4
    num_classes: int = 9
    dtype: str = "float32"
    loader: bool = False
    suffix: str = "jpg"
    dropout: float = 0.2
    max_degrees: float = 30.0


def make_model(load: Load, axis_name: str | None = train.AXIS) -> Segmenter:
    """The segmenter that the load names."""
    decoders = {
        "baseline": lambda: BaselineDecoder(load.num_classes),
        "improved": lambda: ImprovedDecoder(load.num_classes, dropout_rate=load.dropout, axis_name=axis_name),
    }
    dtype = jnp.dtype(load.dtype)
    encoder = ResNet(load.encoder, axis_name=axis_name, dtype=dtype)
    return Segmenter(encoder, decoders[load.model]().clone(dtype=dtype))


def make_batch(load: Load) -> dict[str, np.ndarray]:
    """One batch of noise, its labels as large as its images."""
    rng, shape = np.random.default_rng(0), (load.batch_size, *load.image_size)
    return {
        "image": rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
        "label": rng.integers(0, load.num_classes, shape, dtype=np.uint8),
        "label_size": np.full((load.batch_size, 2), load.image_size, np.int32),
    }


def make_features(load: Load, number: int) -> np.ndarray:
    """What a frozen encoder could give for so many images: positive noise."""
    variables = jax.eval_shape(make_model(load).init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.uint8))
    image = jax.ShapeDtypeStruct((number, *load.image_size, 3), np.uint8)
    encode = functools.partial(train.encode_step, model=make_model(load))
    features = jax.eval_shape(encode, variables, {"image": image})
    return np.random.default_rng(0).random(features.shape, np.float32).astype(features.dtype)


@contextlib.contextmanager
def open_batches(load: Load, work: str) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    """Endless batches: always the same, or, with `load.loader`, from files a quarter larger than the images."""
    if not load.loader:
        batch = make_batch(load)
        if work == "stage1-cached":
            batch = {"features": make_features(load, load.batch_size), "label": batch["label"]}
        yield itertools.repeat(batch)
        return
    rng, number = np.random.default_rng(0), 4 * load.batch_size
    height, width = (length * 5 // 4 for length in load.image_size)
    with tempfile.TemporaryDirectory() as root:
        for part in ("img", "seg"):
            (pathlib.Path(root) / "train" / part).mkdir(parents=True)
            (pathlib.Path(root) / "val" / part).mkdir(parents=True)
        for split, index in itertools.product(("train", "val"), range(number)):
            # Enlarged noise: it compresses about as a photograph does.
            noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            label = rng.integers(0, load.num_classes, (height // 8, width // 8), dtype=np.uint8)
            path = pathlib.Path(root) / split / "img" / f"{index}.{load.suffix}"
            noise.resize((width, height)).save(path, quality=90)
            Image.fromarray(label).resize((width, height), 0).save(pathlib.Path(root) / split / "seg" / f"{index}.png")
        _, splits = folder.open_folder(pathlib.Path(root), load.num_classes)
        sizes: dict[str, Any] = {"image_size": load.image_size, "batch_size": load.batch_size}
        if work.startswith("stage"):
            features = make_features(load, number) if work == "stage1-cached" else None
            yield iter(loader.train_batches(splits["train"], seed=0, features=features, **sizes))
        else:
            yield itertools.chain.from_iterable(itertools.repeat(loader.eval_batches(splits["val"], **sizes)))


def prepare(work: str, load: Load, batches: Iterator[dict[str, np.ndarray]]) -> Callable[[int], None]:
    """Builds `work_on(number)`, which does a piece of work on that many batches and waits until it is done.

    Args:
      work: one of WORKS.
      load: what is worked on.
      batches: endless host batches.
    """
    model, devices = make_model(load), jax.local_devices()
    image = np.zeros((1, 64, 64, 3), np.uint8)
    variables = train.replicate(initializers.init(model, jax.random.key(0), image), devices)
    special = {"validation": ("image", "label", "label_size"), "stage1-cached": ("features", "label")}
    names = special.get(work, ("image", "label"))
    batches = ({name: batch[name] for name in names} for batch in batches)
    if work.startswith("stage"):
        freeze = work != "stage2"
        tx = make_optimizer(1e-3, freeze)
        update = functools.partial(
            train.train_step,
            model=make_model(dataclasses.replace(load, dropout=0.0 if freeze else load.dropout)),
            tx=tx,
            freeze_encoder=freeze,
            max_degrees=load.max_degrees if load.model == "improved" and work != "stage1-cached" else 0.0,
            axis_name=train.AXIS,
        )
        step = train.pmap_step(update, devices, donate=True, compact=not freeze, keyed=True)
        state, key = train.start_stage(variables, tx, devices), train.replicate(jax.random.key(0), devices)
        variables = None  # the state has copies
        on_devices = train.batches_on_devices(batches, devices)

        def work_on(number: int) -> None:
            nonlocal state
            for _ in range(number):
                state, metrics = step(state, next(on_devices), key)
            jax.block_until_ready((state, metrics))

    elif work == "validation":
        evaluate = train.make_evaluate(model, load.num_classes, devices)

        def work_on(number: int) -> None:
            evaluate(variables, itertools.islice(batches, number))

    else:

        def predict(variables: Any, batch: Any) -> jax.Array:
            logits: Any = model.apply(variables, batch["image"])
            return logits.argmax(-1)

        step = train.pmap_step(predict, devices, per_image=True)
        on_devices = train.batches_on_devices(batches, devices)

        def work_on(number: int) -> None:
            outputs = [step(variables, next(on_devices)) for _ in range(number)]
            jax.block_until_ready(outputs)

    return work_on


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution or batch norm of a model.

    Attributes:
      name: its path, such as 'encoder/layer1_0/conv1'.
      module: the layer, unbound; a batch norm takes its batch's statistics.
      shape: of its input, with the batch.
      gigaflops: of a convolution's forward pass on the batch, a multiplication and an addition being two operations; a
        batch norm's are not counted.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    gigaflops: float


def list_layers(load: Load) -> list[Layer]:
    """The convolutions and batch norms of a model in the order in which an image passes them; nothing is computed."""
    found: dict[str, Layer] = {}
    model = make_model(load, axis_name=None)

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(module, (Conv, ConvTranspose, BatchNorm)):
            return output
        work, changes = 0.0, {}
        if isinstance(module, BatchNorm):
            changes = {"use_running_average": False}
        else:
            # An output of a transposed convolution sees 2x2 of its 4x4 taps.
            taps = 4 if isinstance(module, ConvTranspose) else math.prod(module.kernel_size)
            work = 2 * taps * args[0].shape[-1] * math.prod(output.shape) / 1e9
        name = "/".join(module.path)
        found[name] = Layer(name, module.clone(parent=None, name=None, **changes), args[0].shape, work)
        return output

    with nn.intercept_methods(record):
        image = jax.ShapeDtypeStruct((load.batch_size, *load.image_size, 3), jnp.uint8)
        jax.eval_shape(model.init, jax.random.key(0), image)
    return list(found.values())


def gigaflops(work: str, load: Load) -> float:
    """The useful work on one image: that of the convolutions, in 10^9 operations.

    A layer that trains takes three times as much as its forward pass, but for the first one's input gradient, which
    nobody needs. However a step computes them, and whatever else it does, this is what is counted.
    """
    total = 0.0
    for index, layer in enumerate(list_layers(dataclasses.replace(load, batch_size=1))):
        decodes = layer.name.startswith("decoder")
        if work == "stage1-cached" and not decodes:
            continue
        trains = work == "stage2" or (work.startswith("stage1") and decodes)
        total += layer.gigaflops * (1 + trains * (1 if index == 0 else 2))
    return total
