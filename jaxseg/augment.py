"""Augmentation of an image together with its label: pure functions of a key, for one example; batches are `jax.vmap`'s.

Labels are moved, never blended: between two classes there is no third.
"""

import jax
import jax.numpy as jnp

# The mean of ImageNet's pixels as uint8 RGB: after normalising, the input's zero but for rounding.
MEAN_COLOUR = (124, 116, 104)


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


def _source_coordinates(height: int, width: int, angle: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Where each output pixel comes from: y and x, (height, width) float32, 0 at the centre of the first pixel."""
    radians = jnp.deg2rad(jnp.asarray(angle, jnp.float32))
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    # Halves and integers are exact in float32: at 0 degrees every pixel comes from itself.
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - middle_y
    x = jnp.arange(width, dtype=jnp.float32) - middle_x
    return cos * y + sin * x + middle_y, cos * x - sin * y + middle_x
