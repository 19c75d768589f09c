"""A trained run as a function: `load_run(workdir) -> Trained`, `segment(trained, image) -> class map`."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxseg import checkpoint, train
from jaxseg.classify import make_classify
from jaxseg.data.labels import Labels
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.manner import Manner, prepare
from jaxseg.resnet import VARIANTS, ResNet
from jaxseg.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has learnt.

    Attributes:
      model: the segmenter, (N, H, W, 3) uint8 -> logits (N, H, W, C) float32.
      variables: its {'params', 'batch_stats'}, float32, on the default device.
      labels: the names and colours of the C classes.
      image_size: height and width in pixels that the run's images were resized to.
      settings: the run's options as its config.json has them, `dataset` and `encoder` among them.
      checkpoint: which one it is: 'stage_name', 'epoch' and 'score', the mean IoU on the validation split, or None
        where it was saved in the middle of an epoch.
    """

    model: nn.Module
    variables: Any
    labels: Labels
    image_size: tuple[int, int]
    settings: dict[str, Any]
    checkpoint: dict[str, Any]

    @property
    def manner(self) -> Manner:
        """How the run's own evaluation classifies images: resized to `image_size`, or with --eval-size native not."""
        return Manner(None if self.settings.get("eval_size") == "native" else self.image_size)


def load_run(workdir: str | pathlib.Path, which: str | int = checkpoint.BEST, dtype: str | None = None) -> Trained:
    """Loads a model that `experiments.baseline` or `experiments.improved` trained; changes nothing in its folder.

    Args:
      workdir: of the run, which may still be training; or one checkpoint in it, such as `RUN/checkpoints/7`.
      which: 'best' by validation mean IoU, 'last', or a checkpoint's number.
      dtype: of the computation, 'float32' or 'bfloat16'; None for the one it was trained with.

    Raises:
      ValueError: there is no such run or checkpoint, or it is damaged; in one line.
      OSError: it cannot be read.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if not workdir.is_dir():
        raise ValueError(f"{workdir}: no such folder: name the workdir of a run")
    # The description that was saved with the model, not config.json: it has a checksum.
    variables, meta = checkpoint.read_model(workdir, which)
    try:
        settings = meta["settings"]
        model = _make_model(settings["encoder"], dtype or settings.get("dtype", "float32"), variables["params"])
        labels = Labels(tuple(meta["names"]), tuple(tuple(colour) for colour in meta["colours"]))
        height, width = settings["image_size"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{workdir}: its checkpoint is not one of a run of this program ({error!r})") from error
    about = {name: meta.get(name) for name in ("stage_name", "epoch", "score")}
    return Trained(model, train.replicate(variables, jax.local_devices()[:1]), labels, (height, width), settings, about)


def _make_model(encoder: str, dtype: str, params: Any) -> Segmenter:
    """The segmenter of these parameters: they tell the decoder's kind, widths and classes, in old runs too."""
    if encoder not in VARIANTS:
        raise ValueError(f"unknown encoder {encoder!r}")
    decoder = params["decoder"]
    widths = tuple(
        decoder[f"conv_transpose{layer}"]["kernel"].shape[-1]
        for layer in range(1, 1 + sum(name.startswith("conv_transpose") for name in decoder))
    )
    kind = ImprovedDecoder if "bn1" in decoder else BaselineDecoder
    number = decoder["head"]["bias"].size
    return Segmenter(ResNet(encoder, dtype=jnp.dtype(dtype)), kind(number, widths, dtype=jnp.dtype(dtype)))


def segment(trained: Trained, image: np.ndarray, manner: Manner | None = None) -> np.ndarray:
    """Classifies every pixel of an image.

    Args:
      trained: from `load_run`.
      image: (H, W, 3) uint8 RGB, any H and W from 1 up.
      manner: how; None for `trained.manner`. `Manner(None)` is at its own size, whatever the run's was. At its own
        size a program is compiled for each number of rows and columns of 32 pixels; otherwise for few.

    Returns:
      (H, W) uint8 class indices.

    Raises:
      ValueError: `image` is not of that shape and type.
    """
    manner = manner or trained.manner
    classify = make_classify(trained.model, trained.variables, manner, jax.local_devices()[:1], batch_size=1)
    ((_, classes),) = classify([("image", prepare(image, manner))])
    return classes
