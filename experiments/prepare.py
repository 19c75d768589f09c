"""From settings to everything a run needs, opened and checked before any training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tqdm import tqdm

from experiments.datasets import find_data
from experiments.processes import ALONE, Processes
from experiments.settings import Settings
from jaxseg import initializers, pretrained, train
from jaxseg.data import loader
from jaxseg.data.balance import median_frequency_weights
from jaxseg.data.labels import Labels
from jaxseg.data.threads import map_ahead
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder, start_at_prior
from jaxseg.resnet import ResNet
from jaxseg.segmenter import STRIDE, Segmenter

# Of the smallest size; what a model's parameters are does not depend on it.
_IMAGE = np.zeros((1, STRIDE, STRIDE, 3), np.uint8)
# Labels: threads that hand over one small label at a time mostly wait for each other. Of few large ones each has some.
_COUNTED_AT_ONCE = 16

# (num_classes, dropout_rate) -> decoder.
MakeDecoder = Callable[[int, float], nn.Module]
# As `experiments.datasets.find_data`.
FindData = Callable[[Settings], tuple[Labels, Callable[[], dict[str, Any]]]]


def make_baseline(num_classes: int, dropout_rate: float) -> BaselineDecoder:
    """The report's baseline, which drops nothing."""
    return BaselineDecoder(num_classes)


def make_improved(num_classes: int, dropout_rate: float) -> ImprovedDecoder:
    """The report's improved model; its batch statistics are those of all devices' images."""
    return ImprovedDecoder(num_classes, dropout_rate=dropout_rate, axis_name=train.AXIS)


# By experiment.
DECODERS: dict[str, MakeDecoder] = {"baseline": make_baseline, "improved": make_improved}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of once everything is opened and checked.

    Attributes:
      settings: complete settings.
      labels: the class names and colours.
      splits: 'train', 'val' and perhaps 'test': random-access sources.
      make_model: dropout rate -> the segmenter.
      variables: {'params', 'batch_stats'} at the start.
      stages: those that have epochs, by their number, 1 or 2.
      devices: those of all processes.
      processes: the processes that train it.
    """

    settings: Settings
    labels: Labels
    splits: dict[str, Any]
    make_model: Callable[[float], nn.Module]
    variables: Any
    stages: dict[int, train.Stage]
    devices: tuple[jax.Device, ...]
    processes: Processes

    @property
    def model(self) -> nn.Module:
        """The segmenter that drops nothing."""
        return self.make_model(0.0)


def prepare(
    settings: Settings, make_decoder: MakeDecoder, processes: Processes = ALONE, find_data: FindData = find_data
) -> Run:
    """Opens the data and the weights and checks that all fits, before any training.

    Args:
      settings: complete settings.
      make_decoder: (num_classes, dropout_rate) -> decoder.
      processes: the processes of the run; each calls it, and none waits here for the others.
      find_data: finds the data set.

    Raises:
      ValueError: something does not fit; the message is one line for the user.
      OSError: a file or folder cannot be read.
    """
    devices = train.all_devices()
    if settings.batch_size % len(devices):
        fitting = -(-settings.batch_size // len(devices)) * len(devices)
        raise ValueError(
            f"--batch-size {settings.batch_size} cannot be split over {len(devices)} devices: use {fitting}"
        )
    labels, open_splits = find_data(settings)

    def make_model(dropout_rate: float) -> nn.Module:
        dtype = jnp.dtype(settings.dtype)
        encoder = ResNet(settings.encoder, axis_name=train.AXIS, dtype=dtype)
        return Segmenter(encoder, make_decoder(labels.num_classes, dropout_rate).clone(dtype=dtype))

    # First the weights: a wrong file is refused before thousands of images are looked at.
    model = make_model(0.0)
    weights = load_weights(model, settings)
    splits = open_splits()
    loader.steps_per_epoch(splits["train"], settings.batch_size)
    at_prior = settings.decoder_init == "prior" and settings.weights_scope == "encoder"
    if at_prior or settings.class_weights != "none":
        counts = count_classes(splits["train"], labels.num_classes)
    variables = initialise(model, weights, settings.seed)
    if at_prior:
        params = variables["params"]
        params["decoder"] = start_at_prior(params["decoder"], counts.sum(0))
        print("decoder: its first guess is the classes' frequencies (--decoder-init prior)")
    class_weights = None
    if settings.class_weights != "none":
        class_weights = weigh_classes(counts, settings.class_weights)
        each = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(labels.names, class_weights, strict=True))
        print(f"loss: a pixel's weight by its class (--class-weights {settings.class_weights}): {each}")
    names = ("stage 1: encoder frozen", "stage 2: everything")
    stages = {
        index + 1: train.Stage(
            names[index],
            settings.epochs[index],
            settings.learning_rate[index],
            freeze_encoder=index == 0,
            schedule=settings.schedule,
            max_degrees=settings.max_degrees,
            flip=settings.flip,
            jitter=settings.jitter,
            encoder_rate=settings.encoder_rate,
            class_weights=class_weights,
        )
        for index in range(2)
        if settings.epochs[index]
    }
    return Run(settings, labels, splits, make_model, variables, stages, devices, processes)


def load_weights(model: nn.Module, settings: Settings) -> Any:
    """Those of the model's variables that the weights hold: none, the encoder's or all; raises as `prepare` says."""
    if settings.weights == "none":
        print(f"encoder: {settings.encoder}, random numbers (--weights none)")
        return {"params": {}, "batch_stats": {}}
    if settings.weights_scope == "all":
        shapes = jax.eval_shape(model.init, jax.random.key(0), _IMAGE)
        variables = pretrained.load_model(settings.encoder, settings.weights, shapes)
        print(f"encoder and decoder: {settings.encoder}, {settings.weights}")
        return variables
    encoder = pretrained.load_encoder(settings.encoder, settings.weights)
    print(f"encoder: {settings.encoder}, {settings.weights}")
    return {name: {"encoder": tree} for name, tree in encoder.items()}


def initialise(model: nn.Module, weights: Any, seed: int) -> Any:
    """The model's variables: what the weights hold, and else random from the seed.

    Args:
      model: the segmenter.
      weights: {'params', 'batch_stats'}, each of 'encoder' and 'decoder' those that are known.
      seed: of the random numbers.

    Returns:
      {'params', 'batch_stats'} of NumPy arrays.
    """
    if "decoder" in weights["params"]:
        return weights

    key = jax.random.key(seed)
    if weights["params"]:  # the encoder's: the decoder's alone are to be drawn
        features = jax.eval_shape(lambda: model.apply(weights, _IMAGE, method="encode"))
        drawn = initializers.init(model.decoder, key, np.zeros(features.shape, features.dtype))
        return {name: {"decoder": drawn.get(name, {}), **tree} for name, tree in weights.items()}
    return initializers.init(model, key, _IMAGE)


def count_classes(source: Any, num_classes: int) -> np.ndarray:
    """The pixels of each class in each image of a source: (images, num_classes) int64."""

    def count(places: range) -> list[np.ndarray]:
        return [np.bincount(source.label(place).ravel(), minlength=256)[:num_classes] for place in places]

    every = range(len(source))
    parts = map_ahead(count, (every[start : start + _COUNTED_AT_ONCE] for start in every[::_COUNTED_AT_ONCE]))
    counts: list[np.ndarray] = []
    with tqdm(desc="counting pixels", total=len(source), leave=False, unit="img", disable=None) as bar:
        for part in parts:
            counts += part
            bar.update(len(part))
    return np.stack(counts)


def weigh_classes(counts: np.ndarray, rule: str) -> tuple[float, ...]:
    """Each class's weight in the loss by a rule of --class-weights; 1 for a class that no image shows.

    Args:
      counts: (images, num_classes), from `count_classes`.
      rule: 'median' or 'sqrt'.
    """
    among = np.where(counts > 0, counts.sum(1, keepdims=True), 0).sum(0)
    weights = median_frequency_weights(counts.sum(0), among)
    if rule == "sqrt":
        weights = np.sqrt(weights)
    return tuple(np.where(np.isnan(weights), 1.0, weights).tolist())
