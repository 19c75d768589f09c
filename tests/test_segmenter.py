"""Encoder, decoder and padding together, against the PyTorch twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxseg import initializers
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.losses import pixel_cross_entropy
from jaxseg.resnet import VARIANTS, BasicBlock, ResNet
from jaxseg.segmenter import Segmenter, normalise


@pytest.fixture(scope="module")
def model():
    return Segmenter(ResNet(), BaselineDecoder(5))


@pytest.fixture(scope="module")
def variables(model):
    """Random parameters, and batch statistics that are not the initial ones."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, (1 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype(np.float32)
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.2, 0.2)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def twin(variables):
    pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    from tests.peers import torch_twin

    return torch_twin.load(torch_twin.Segmenter(5), variables)


def random_batch(height, width, number=2):
    rng = np.random.default_rng(height + width)
    image = rng.integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    label = rng.integers(0, 5, (number, height, width)).astype(np.uint8)
    label[rng.random(label.shape) < 0.1] = 255
    return image, label


def test_normalise_by_hand():
    value = normalise(jnp.array([[0, 128, 255]], jnp.uint8))
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(value[0], expected, rtol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (33, 31), (352, 448), (360, 480)])
def test_logits_have_the_images_size(model, variables, size):
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, *size, 3), jnp.uint8))
    assert logits.shape == (2, *size, 5)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("size", [(1, 1), (40, 70)])
def test_logits_equal_pytorchs(model, variables, twin, size):
    import torch

    image, _ = random_batch(*size)
    logits = jax.jit(model.apply)(variables, image)
    twin.eval()
    with torch.inference_mode():
        expected = twin(torch.from_numpy(image)).permute(0, 2, 3, 1).numpy()
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= 1e-4


def test_training_loss_and_gradients_equal_pytorchs(model, variables, twin):
    import torch

    from tests.peers import torch_twin

    image, label = random_batch(64, 96, 3)

    def loss_fn(params):
        logits, updates = model.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
        return pixel_cross_entropy(logits, label), updates["batch_stats"]

    (loss, stats), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    twin.train()
    expected = torch.nn.functional.cross_entropy(
        twin(torch.from_numpy(image)), torch.from_numpy(label).long(), ignore_index=255
    )
    twin.zero_grad()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    ours = torch_twin.torch_state({"params": grads, "batch_stats": stats})
    running = dict(twin.named_buffers())
    for name, parameter in twin.named_parameters():
        theirs = parameter.grad
        # In float32 a ReLU's input near 0 falls on different sides; the largest such differences are about 0.5 %.
        assert (ours[name] - theirs).norm() <= 0.02 * theirs.norm(), name
    for name, value in ours.items():
        if name.endswith("running_mean"):
            torch.testing.assert_close(value, running[name], rtol=1e-4, atol=1e-5)


def test_in_bfloat16_what_is_kept_and_the_logits_stay_float32(monkeypatch):
    # Every layer that there is, each once.
    monkeypatch.setitem(VARIANTS, "resnet18", (BasicBlock, (1, 1, 1, 1)))
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    outputs, variables = {}, None
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Segmenter(ResNet(dtype=dtype), ImprovedDecoder(3, dtype=dtype))
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        variables = variables or initializers.init(model, jax.random.key(0), image)

        @jax.jit
        def run(params, model=model, variables=variables):
            logits, updates = model.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
            return logits.std(), (logits, updates)

        (_, (logits, updates)), grads = jax.value_and_grad(run, has_aux=True)(variables["params"])
        assert {leaf.dtype for leaf in jax.tree.leaves((logits, updates, grads))} == {jnp.dtype("float32")}
        outputs[dtype] = logits
    features = jax.eval_shape(functools.partial(model.apply, method="encode"), variables, image)
    assert features.dtype == jnp.bfloat16
    error = np.abs(outputs[jnp.bfloat16] - outputs[jnp.float32])
    assert 0 < error.mean() < 0.05 * outputs[jnp.float32].std()


class TinyEncoder(nn.Module):
    """Stands in for the ResNet: one value for each 32x32 pixels, and a batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        return {32: nn.BatchNorm(use_running_average=not train)(nn.avg_pool(x, (32, 32), (32, 32)))}


def test_the_improved_decoder_drops_by_the_keys_that_the_segmenter_is_given():
    model = Segmenter(TinyEncoder(), ImprovedDecoder(5, widths=(4, 4, 4, 4, 4), dropout_rate=0.5))
    image, _ = random_batch(32, 40)
    variables = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def train(keys):
        return model.apply(variables, image, train=True, keys=keys, mutable=["batch_stats"])

    (logits, updates), (dropped, _), (again, _) = (
        train(keys) for keys in (None, *[jax.random.split(jax.random.key(1), 2)] * 2)
    )
    assert logits.shape == (2, 32, 40, 5)
    assert np.abs(logits - dropped).max() > 1e-3
    np.testing.assert_array_equal(dropped, again)
    for after, before in zip(*(jax.tree.leaves(x) for x in (updates, variables["batch_stats"])), strict=True):
        assert np.any(after != before)


def test_encoding_and_decoding_is_the_whole(model, variables):
    image, _ = random_batch(37, 70)
    features = jax.jit(lambda x: model.apply(variables, x, method="encode"))(image)
    assert features.shape == (2, 2, 3, 512)
    logits = jax.jit(lambda x: model.apply(variables, x, (37, 70), method="decode"))(features)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, image), rtol=1e-4, atol=1e-4)
