"""Encoder and decoder together: a uint8 image in, logits of the same height and width out."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxseg.layers import Conv, ConvTranspose

# ImageNet's channel means and standard deviations, of RGB scaled to [0, 1]; every torchvision ResNet was trained so.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
STRIDE = 32
_CONVOLUTIONS = (Conv, ConvTranspose, nn.Conv, nn.ConvTranspose)


def normalise(image: jnp.ndarray) -> jnp.ndarray:
    """Scales image: (..., 3) uint8 RGB to [0, 1], subtracts the mean and divides by the deviation: float32."""
    return (image.astype(jnp.float32) / 255.0 - jnp.array(MEAN)) / jnp.array(STD)


def _on_their_own(size: jax.Array | None, canvas: tuple[int, int]) -> contextlib.AbstractContextManager:
    """Within it convolutions see zeros where an image with its own padding would end, though its canvas goes on.

    Zeros are what they pad with. Without them the canvas would be seen: batch norm makes what is beyond an image other
    than zero. No other layer mixes places, but max-pool, whose windows end where multiples of the stride do.

    Args:
      size: (N, 2) integer, the height and width of each image, or None: there is nothing to hide.
      canvas: height and width in pixels, multiples of `STRIDE`.
    """
    if size is None:
        return contextlib.nullcontext()

    def hide(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, _CONVOLUTIONS):
            x, *others = args
            ends = -(-size // STRIDE) * STRIDE * x.shape[1] // canvas[0]
            args = (jnp.where(_inside(ends, x.shape[1:3]), x, 0), *others)
        return call(*args, **kwargs)

    return nn.intercept_methods(hide)


def _inside(size: jax.Array, canvas: tuple[int, int]) -> jax.Array:
    """Whether each place of a canvas is within size, (N, 2) integer: (N, H, W, 1) bool."""
    down, along = (jnp.arange(length) < size[:, axis, None] for axis, length in enumerate(canvas))
    return (down[:, :, None] & along[:, None, :])[..., None]


class Segmenter(nn.Module):
    """Classifies every pixel.

    Attributes:
      encoder: (N, H, W, 3) float -> {stride: features}; called with `train`.
      decoder: features at stride 32 -> logits at stride 1; called with `train` and `keys`.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __call__(
        self,
        image: jnp.ndarray,
        train: bool = False,
        keys: jax.Array | None = None,
        size: jax.Array | None = None,
    ) -> jnp.ndarray:
        """Computes the logits.

        Args:
          image: (N, H, W, 3) uint8; any H and W from 1 up.
          train: batch norm uses, and updates, the batch's statistics.
          keys: (N,) keys, one for each image, for what the decoder draws in training (dropout); None: it draws nothing.
          size: (N, 2) integer, the height and width of each image, where it lies in the corner of a larger canvas: the
            logits within it are those of the image alone. See `jaxseg.data.canvases`.

        Returns:
          logits: (N, H, W, num_classes) float32.
        """
        features = self.encode(image, train=train, size=size)
        height, width = image.shape[1:3]
        with _on_their_own(size, (features.shape[1] * STRIDE, features.shape[2] * STRIDE)):
            return self.decode(features, (height, width), train=train, keys=keys)

    def encode(self, image: jnp.ndarray, train: bool = False, size: jax.Array | None = None) -> jnp.ndarray:
        """Computes what the decoder needs of the encoder.

        Args:
          image: as in `__call__`.
          train: the encoder's batch norm uses, and updates, the batch's statistics.
          size: as in `__call__`.

        Returns:
          (N, ceil(H / 32), ceil(W / 32), C), of the encoder's dtype.
        """
        height, width = image.shape[1:3]
        # The padding's value, 0 after normalising, is the mean colour.
        padding = ((0, 0), (0, -height % STRIDE), (0, -width % STRIDE), (0, 0))
        x = normalise(image)
        if size is not None:
            x = jnp.where(_inside(size, (height, width)), x, 0)
        x = jnp.pad(x, padding)
        with _on_their_own(size, (x.shape[1], x.shape[2])):
            return self.encoder(x, train=train)[STRIDE]

    def decode(
        self, features: jnp.ndarray, size: tuple[int, int], train: bool = False, keys: jax.Array | None = None
    ) -> jnp.ndarray:
        """Computes the logits (N, *size, num_classes) of images of this (height, width) from what `encode` gave."""
        height, width = size
        return self.decoder(features, train=train, keys=keys)[:, :height, :width]
