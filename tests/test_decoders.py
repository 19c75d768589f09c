"""Where the decoder starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxseg.decoders import BaselineDecoder, start_at_prior
from jaxseg.layers import conv_transpose

COUNTS = np.array([899, 0, 99])


@pytest.fixture(scope="module")
def decoder():
    model = BaselineDecoder(num_classes=3, widths=(8, 8, 4, 4, 4))
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1, 1, 8)))["params"]


def test_without_features_the_first_guess_is_the_frequencies(decoder):
    model, params = decoder
    logits = model.apply({"params": start_at_prior(params, COUNTS)}, jnp.zeros((1, 1, 2, 8)))
    probabilities = np.asarray(jax.nn.softmax(logits))
    assert probabilities.shape == (1, 32, 64, 3)
    # One pixel is added to each class: 900, 1 and 100 of 1001.
    np.testing.assert_allclose(
        probabilities, np.broadcast_to(np.array([900, 1, 100]) / 1001, (1, 32, 64, 3)), rtol=1e-5
    )


def test_what_all_inputs_share_does_not_pass(decoder):
    _, params = decoder
    started = start_at_prior(params, COUNTS)
    x = jax.random.normal(jax.random.key(1), (1, 5, 6, 8))
    kernel = started["conv_transpose1"]["kernel"]
    # Away from the borders, where some taps see the padding.
    inner = np.s_[:, 2:-2, 2:-2]
    same, shifted = conv_transpose(x, kernel)[inner], conv_transpose(x + 3.0, kernel)[inner]
    np.testing.assert_allclose(shifted, same, atol=1e-5)
    before = params["conv_transpose1"]["kernel"]
    assert np.abs(conv_transpose(x + 3.0, before)[inner] - conv_transpose(x, before)[inner]).max() > 0.1


def test_the_variance_survives_the_layers():
    model = BaselineDecoder(num_classes=3)
    x = nn.relu(jax.random.normal(jax.random.key(0), (2, 8, 8, 512)))
    params = start_at_prior(model.init(jax.random.key(1), x[:, :1, :1])["params"], COUNTS)
    for layer in range(1, 6):
        y = conv_transpose(x, params[f"conv_transpose{layer}"]["kernel"])
        inner = y[:, 2:-2, 2:-2]
        ratio = float((inner**2).mean() / (2 * (x**2).mean()))
        # Deeper inputs are correlated; the first layer's are the normal ones that the scale was computed for.
        assert (0.9 < ratio < 1.1) if layer == 1 else (0.5 < ratio < 2), (layer, ratio)
        x = nn.relu(y)[:, :16, :16]


def test_the_head_is_scaled(decoder):
    _, params = decoder
    started = start_at_prior(params, COUNTS, scale=0.25)
    np.testing.assert_allclose(started["head"]["kernel"], 0.25 * params["head"]["kernel"])
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, params)
