"""Augmentation of an image together with its label: pure functions of a key, for one example; batches are `jax.vmap`'s.

Labels are moved, never blended: between two classes there is no third.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxseg.data.canvases import MEAN_COLOUR

# ITU-R BT.601, in the digits that torchvision has.
_GREY = (0.2989, 0.587, 0.114)


def draw_angle(key: jax.Array, max_degrees: float) -> jax.Array:
    """Draws an angle, uniform from -max_degrees to max_degrees: () float32, in degrees.

    Raises:
      ValueError: max_degrees is not from 0 to 180.
    """
    if not 0 <= max_degrees <= 180:
        raise ValueError(f"max_degrees must be from 0 to 180, not {max_degrees}")
    return jax.random.uniform(key, minval=-max_degrees, maxval=max_degrees)


def rotate(
    image: jax.Array, label: jax.Array, angle: jax.Array | float, ignore_label: int = 255
) -> tuple[jax.Array, jax.Array]:
    """Rotates an image and its label about their centre; the size stays, corners are cut off and revealed.

    The image is interpolated bilinearly, and rounded to the nearest integer, halves to the even one; the label takes
    the nearest pixel's value. A pixel whose nearest source pixel lies outside is revealed, in image and label alike.

    Args:
      image: (H, W, 3) uint8 RGB.
      label: (H, W) integer.
      angle: () degrees, counter-clockwise as the image is displayed; 0 changes nothing at all.
      ignore_label: what the label becomes where it is revealed; there the image becomes `MEAN_COLOUR`.

    Returns:
      The image, (H, W, 3) uint8, and the label, (H, W) of its type.

    Source: equals scipy.ndimage.rotate(..., angle, reshape=False), with order 1 and mode 'nearest' for the image, with
      order 0 and mode 'grid-constant' for the label, where float32 coordinates fall on the same side of a half.
    """
    height, width = label.shape
    y, x = _source_coordinates(height, width, angle)
    inside = (y >= -0.5) & (y < height - 0.5) & (x >= -0.5) & (x < width - 0.5)
    # Within half a pixel of the edge the image goes on with the edge's value.
    y, x = jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)
    top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, height - 1), jnp.minimum(left + 1, width - 1)
    down, along = y - top, x - left
    # Looked up by one index rather than two, which takes half the time on a CPU.
    pixels, classes = image.reshape(height * width, 3), label.reshape(height * width)

    def blend_row(row: jax.Array) -> jax.Array:
        """Interpolates along x between the pixels of one source row for each output pixel."""
        first, second = (jnp.take(pixels, row * width + column, axis=0, mode="clip") for column in (left, right))
        weight = along[..., None]
        return (1 - weight) * first.astype(jnp.float32) + weight * second.astype(jnp.float32)

    blended = (1 - down[..., None]) * blend_row(top) + down[..., None] * blend_row(bottom)
    nearest = jnp.where(down < 0.5, top, bottom) * width + jnp.where(along < 0.5, left, right)
    rotated = jnp.where(inside[..., None], jnp.rint(blended), jnp.array(MEAN_COLOUR, jnp.float32))
    moved = jnp.where(inside, jnp.take(classes, nearest, mode="clip"), jnp.array(ignore_label, label.dtype))
    return rotated.astype(jnp.uint8), moved


def random_rotate(
    key: jax.Array, image: jax.Array, label: jax.Array, max_degrees: float, ignore_label: int = 255
) -> tuple[jax.Array, jax.Array]:
    """Rotates an image and its label by the same angle, as `rotate` does, drawn by `draw_angle`.

    For a batch, with a key for each image: `jax.vmap(random_rotate, (0, 0, 0, None))(keys, image, label, 30.0)`.

    Args:
      key: of this image alone.
      image: (H, W, 3) uint8 RGB.
      label: (H, W) integer.
      max_degrees: the largest angle in either direction, from 0 to 180; with 0 nothing changes at all.
      ignore_label: see `rotate`.

    Returns:
      The image, (H, W, 3) uint8, and the label, (H, W) of its type.

    Raises:
      ValueError: max_degrees is not from 0 to 180.
    """
    return rotate(image, label, draw_angle(key, max_degrees), ignore_label)


def random_flip(key: jax.Array, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mirrors an image (H, W, ...) and its label (H, W), left for right, in half of the draws; else changes nothing."""
    flips = jax.random.bernoulli(key)
    return jnp.where(flips, image[:, ::-1], image), jnp.where(flips, label[:, ::-1], label)


def random_jitter(key: jax.Array, image: jax.Array, strength: Sequence[float]) -> jax.Array:
    """Changes an image's brightness, contrast, saturation and hue, as `jitter` does, in a random order.

    Args:
      key: of this image alone.
      image: (H, W, 3) uint8 RGB.
      strength: of brightness, contrast, saturation and hue. The first three's factors are drawn from max(0, 1 - it) to
        1 + it, the shift of the hue, in turns, from -it to it; with 0 there is no change.

    Returns:
      (H, W, 3) uint8.

    Raises:
      ValueError: `strength` is not four numbers from 0 up, the last at most 0.5.

    Source: torchvision.transforms.v2.ColorJitter.
    """
    if len(strength) != 4 or not all(0 <= x < float("inf") for x in strength) or strength[3] > 0.5:
        raise ValueError(f"the jitter must be four numbers from 0 up, the last at most 0.5, not {strength}")
    for_factors, for_order = jax.random.split(key)
    around, spread = jnp.array([1.0, 1.0, 1.0, 0.0]), jnp.array(strength, jnp.float32)
    low = jnp.where(around == 1, jnp.maximum(around - spread, 0), -spread)
    factors = jax.random.uniform(for_factors, (4,), minval=low, maxval=around + spread)
    return jitter(image, factors, jax.random.permutation(for_order, 4))


def jitter(image: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Changes an image's brightness, contrast, saturation and hue.

    Brightness blends with black (a factor of 0 gives black, of 1 no change, above 1 more), contrast with the image's
    mean grey, saturation with each pixel's grey. Each result is clipped; only the last one is rounded.

    Args:
      image: (H, W, 3) uint8 RGB.
      factors: (4,) float: of brightness, contrast and saturation from 0 up, and the shift of the hue in turns.
      order: (4,) integer, a permutation of 0 (brightness) to 3 (hue): which comes first, second, ...

    Returns:
      (H, W, 3) uint8.

    Source: torchvision.transforms.v2.functional.adjust_brightness, adjust_contrast, adjust_saturation and adjust_hue
      of a float32 image.
    """

    def blend(x: jax.Array, change: jax.Array) -> jax.Array:
        grey = (x * jnp.array(_GREY)).sum(-1, keepdims=True)
        other = jnp.where(change == 0, 0, jnp.where(change == 1, grey.mean(), grey))
        return jnp.clip(factors[change] * x + (1 - factors[change]) * other, 0, 1)

    # In a vmap every branch is computed. So the hue, which takes longest, is turned in one place; the others, which are
    # one formula, come before it or after it.
    x, turn_hue = image.astype(jnp.float32) / 255, order.argmax()
    for place in range(3):
        x = jnp.where(place < turn_hue, blend(x, order[place]), x)
    x = _turn_hue(x, factors[3])
    for place in range(1, 4):
        x = jnp.where(place > turn_hue, blend(x, order[place]), x)
    return jnp.rint(x * 255).astype(jnp.uint8)


def _turn_hue(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Shifts the hue of x, (H, W, 3) in [0, 1], in HSV; what is grey stays."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value, chroma = x.max(-1), x.max(-1) - x.min(-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    # In sixths of a turn, from red. Not `value == red`: compiled, a number that is computed twice may differ in a bit.
    hue = jnp.where(green >= blue, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = jnp.where((red >= green) & (red >= blue), (green - blue) / divisor, hue) + 6 * turns
    ahead = (hue[..., None] + jnp.array([5.0, 3.0, 1.0])) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(ahead, 4 - ahead), 0, 1)


def _source_coordinates(height: int, width: int, angle: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Where each output pixel comes from: y and x, (height, width) float32, 0 at the centre of the first pixel."""
    radians = jnp.deg2rad(jnp.asarray(angle, jnp.float32))
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    # Halves and integers are exact in float32: at 0 degrees every pixel comes from itself.
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - middle_y
    x = jnp.arange(width, dtype=jnp.float32) - middle_x
    return cos * y + sin * x + middle_y, cos * x - sin * y + middle_x
