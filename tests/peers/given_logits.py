"""A model whose predictions are given."""

import jax.numpy as jnp
from flax import linen as nn


class GivenLogits(nn.Module):
    """Takes the image's own values for the logits of three classes."""

    @nn.compact
    def __call__(self, image):
        return image.astype(jnp.float32)
