"""The encoder against PyTorch's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.pretrained import load_encoder
from jaxseg.resnet import ResNet
from jaxseg.segmenter import normalise


@pytest.fixture(scope="module")
def template():
    return jax.eval_shape(ResNet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_features_and_parameters_have_torchvisions_shapes(template):
    sizes = [leaf.size for leaf in jax.tree.leaves(template["params"])]
    # torchvision's ResNet-18 has 11,689,512 parameters, 513,000 of them in fc.
    assert sum(sizes) == 11_689_512 - 513_000
    features = jax.eval_shape(ResNet().apply, template, jnp.zeros((2, 45, 70, 3)))
    shapes = {stride: value.shape for stride, value in features.items()}
    # Each halving rounds up.
    assert shapes == {2: (2, 23, 35, 64), 4: (2, 12, 18, 64), 8: (2, 6, 9, 128), 16: (2, 3, 5, 256), 32: (2, 2, 3, 512)}


def test_pretrained_features_equal_pytorch_at_every_stride(shared, template):
    variables = load_encoder(shared / "weights" / "resnet18-9f26ff83.pth", template)
    reference = np.load(shared / "reference" / "resnet18_features.npz")
    features = jax.jit(ResNet().apply)(variables, normalise(reference["image"]))
    for stride, value in features.items():
        # The two finest maps are stored at every fourth row and column.
        value = value[:, ::4, ::4] if stride <= 4 else value
        expected = reference[f"stride{stride}"]
        assert value.shape == expected.shape
        assert np.abs(value - expected).max() / np.abs(expected).max() <= 1e-4
