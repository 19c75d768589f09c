"""Logits enlarged to an image's own size, any part of the result alone, and each value the same in every part."""

import jax
import jax.numpy as jnp


def enlarge(
    logits: jax.Array,
    size: jax.Array,
    own_size: jax.Array,
    first: jax.Array,
    block: tuple[int, int],
    mirrored: bool = False,
) -> jax.Array:
    """Interpolates logits bilinearly, with half-pixel centres, and without antialiasing where they shrink.

    Where a pixel lies between the logits is computed in whole numbers, so that its value depends on its place alone:
    not on the block that it is computed in, nor on the program. Sizes are traced: one compilation serves all images.
    Two values along each axis are looked up and weighted; as the matrix products of `jax.image.scale_and_translate` it
    took five to ten times as long on a CPU.

    Args:
      logits: (h, w, C) float32.
      size: (2,) int32, the height and width in the corner of `logits` that count.
      own_size: (2,) int32, the size that they are enlarged to; each side times that of `size` is below 2^30.
      first: (2,) int32, the row and column of the result with which the block begins.
      block: rows and columns to compute; what is beyond `own_size` repeats the last one.
      mirrored: the logits are those of the mirrored image, left and right exchanged; the result is not.

    Returns:
      (*block, C) float32.

    Source: torch.nn.functional.interpolate(mode="bilinear", align_corners=False).
    """
    (top, bottom, down), (left, right, across) = (
        _neighbours(first[axis], block[axis], size[axis], own_size[axis]) for axis in (0, 1)
    )
    if mirrored:
        left, right = size[1] - 1 - left, size[1] - 1 - right
    down, across = down[:, None, None], across[:, None]
    rows = logits[top] * (1 - down) + logits[bottom] * down
    return rows[:, left] * (1 - across) + rows[:, right] * across


def _neighbours(
    first: jax.Array, number: int, size: jax.Array, own_size: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each place along an axis the two places in the logits that it lies between, and the second one's weight."""
    place = jnp.minimum(first + jnp.arange(number), own_size - 1)
    # (place + 1/2) * size / own_size - 1/2, times 2 own_size.
    numerator = jnp.maximum((2 * place + 1) * size - own_size, 0)
    low = numerator // (2 * own_size)
    weight = (numerator % (2 * own_size)).astype(jnp.float32) / (2 * own_size).astype(jnp.float32)
    return low, jnp.minimum(low + 1, size - 1), weight
