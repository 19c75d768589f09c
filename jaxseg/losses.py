"""Pixel cross-entropy that is right about ignored pixels."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxseg.devices import mean_over_devices


def pixel_cross_entropy(
    logits: jnp.ndarray,
    label: jnp.ndarray,
    ignore_label: int = 255,
    axis_name: str | None = None,
    class_weights: Sequence[float] | None = None,
) -> jnp.ndarray:
    """Softmax cross-entropy in nats, averaged over the pixels that are not ignored.

    Under a pmap, each device's value is its own pixels' sum divided by the *mean* number of valid pixels per device (or
    sum of their weights), so that the mean of the values over devices, and of their gradients, is that of the global
    batch, however unevenly the ignored pixels lie. Take `mean_over_devices` of both.

    Args:
      logits: (N, H, W, C) float; computed in float32.
      label: (N, H, W) integer in [0, C) or `ignore_label`.
      ignore_label: pixels with this label count neither in the sum nor in the number.
      axis_name: the pmap axis, or None on one device.
      class_weights: C finite numbers above 0, how much a pixel of each class counts in the sum and in the number; all 1
        if None.

    Returns:
      The loss: () float32; 0 with gradient 0 when no pixel is valid.

    Raises:
      ValueError: the weights are not as said.

    Source: equals torch.nn.functional.cross_entropy(..., weight, ignore_index) where a pixel is valid.
    """
    valid, logits, num_classes = label != ignore_label, logits.astype(jnp.float32), logits.shape[-1]
    cross_entropy = jax.nn.logsumexp(logits, -1) - _label_logit(logits, label)
    # A label that is none makes the loss infinite, or no number; nothing else here is, for `jax.debug_nans` to find.
    cross_entropy /= jnp.where(valid & ((label < 0) | (label >= num_classes)), 0.0, 1.0)
    if class_weights is None:
        count = valid.sum(dtype=jnp.int32).astype(jnp.float32)
    else:
        if len(class_weights) != num_classes or not all(0 < weight < math.inf for weight in class_weights):
            raise ValueError(f"class_weights must be {num_classes} finite numbers above 0, not {class_weights}")
        weight = jnp.array(class_weights, jnp.float32)[jnp.where(valid, label, 0).astype(jnp.int32)]
        cross_entropy, count = weight * cross_entropy, jnp.where(valid, weight, 0.0).sum()
    count = mean_over_devices(count, axis_name)
    return jnp.where(valid, cross_entropy, 0.0).sum() / jnp.where(count > 0, count, 1.0)


@jax.custom_jvp
def _label_logit(logits: jax.Array, label: jax.Array) -> jax.Array:
    """(N, H, W, C), (N, H, W) -> (N, H, W): each pixel's logit of its label; where that is none, of another class."""
    return jnp.take_along_axis(logits, label[..., None].astype(jnp.int32), -1, mode="clip")[..., 0]


@_label_logit.defjvp
def _label_logit_jvp(arrays, tangents):
    (logits, label), (tangent, _) = arrays, tangents
    # Compared and added, not looked up, whose gradient would be added up at indices.
    is_label = label[..., None] == jnp.arange(logits.shape[-1])
    return _label_logit(logits, label), jnp.where(is_label, tangent, 0).sum(-1)
