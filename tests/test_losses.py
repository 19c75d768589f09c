"""The loss against PyTorch's, and its edge cases by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxseg.losses import pixel_cross_entropy


def random_case(seed, ignored=0.3, shape=(4, 5, 6), num_classes=7):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 5, (*shape, num_classes)).astype(np.float32)
    label = rng.integers(0, num_classes, shape).astype(np.uint8)
    label[rng.random(shape) < ignored] = 255
    return logits, label


WEIGHTS = (0.1, 3.0, 1.0, 0.5, 7.0, 0.01, 2.0)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_equal_pytorch(seed, weights):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    logits, label = random_case(seed, ignored=seed / 5)
    loss_fn = functools.partial(pixel_cross_entropy, class_weights=weights)
    loss, grad = jax.jit(jax.value_and_grad(loss_fn))(logits, label)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        theirs.permute(0, 3, 1, 2), torch.tensor(label).long(), weights and torch.tensor(weights), ignore_index=255
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_derivatives_equal_differences_in_both_modes(weights):
    logits, label = random_case(6, shape=(1, 2, 3))
    loss_fn = functools.partial(pixel_cross_entropy, label=label, class_weights=weights)
    check_grads(loss_fn, (logits / 5,), order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)


def test_the_labels_logit_is_looked_up_and_its_gradient_compared():
    """Looked up, the loss needs less memory; a gradient that is added up at indices would need more."""
    logits, label = random_case(7)
    value, gradient = (
        jax.jit(function).lower(logits, label).as_text()
        for function in (pixel_cross_entropy, jax.grad(pixel_cross_entropy))
    )
    assert "stablehlo.gather" in value
    assert "stablehlo.scatter" not in gradient


def test_uniform_logits_give_the_logarithm_of_the_number_of_classes():
    loss = pixel_cross_entropy(jnp.zeros((1, 2, 2, 9)), jnp.array([[[0, 8], [255, 3]]]))
    np.testing.assert_allclose(loss, np.log(9), rtol=1e-6)


@pytest.mark.parametrize("label", [3, 254, -1])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 3.0)])
def test_a_label_that_is_none_gives_no_finite_loss(label, weights):
    labels = jnp.array([[[0, 1, label]]])
    assert not jnp.isfinite(pixel_cross_entropy(jnp.zeros((1, 1, 3, 3)), labels, class_weights=weights))


def test_a_pixel_that_weighs_twice_counts_as_two():
    logits = jnp.array([[[[0.0, 1.0], [0.0, 3.0], [0.0, 3.0]]]])
    twice = pixel_cross_entropy(logits[:, :, :2], jnp.array([[[0, 1]]]), class_weights=(1.0, 2.0))
    np.testing.assert_allclose(twice, pixel_cross_entropy(logits, jnp.array([[[0, 1, 1]]])), rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0, float("nan")), (1.0, 0.0, 1.0), (1.0, float("inf"), 1.0)])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="must be 3 finite numbers above 0"):
        pixel_cross_entropy(jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 1, 1), jnp.uint8), class_weights=weights)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_no_valid_pixel_gives_zero_and_a_zero_gradient(weights):
    logits, label = random_case(0, ignored=1.1)
    loss, grad = jax.value_and_grad(pixel_cross_entropy)(logits, label, class_weights=weights)
    assert loss == 0
    np.testing.assert_array_equal(grad, np.zeros_like(logits))


def test_what_an_ignored_pixel_predicts_does_not_matter():
    logits, label = random_case(1)
    changed = np.where((label == 255)[..., None], np.float32(1e30), logits)
    assert pixel_cross_entropy(logits, label) == pixel_cross_entropy(changed, label)


@pytest.mark.parametrize("ignore_label", [0, 3, -1])
def test_any_label_may_be_the_ignored_one(ignore_label):
    logits, label = random_case(3)
    label = label.astype(np.int32)
    expected = pixel_cross_entropy(logits, np.where(label == ignore_label, 255, label))
    other = np.where(label == 255, ignore_label, label)
    np.testing.assert_allclose(pixel_cross_entropy(logits, other, ignore_label), expected, rtol=1e-6)


def test_half_precision_is_computed_in_float32():
    logits, label = random_case(4)
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray(logits, dtype)
        loss = pixel_cross_entropy(half, label)
        assert loss.dtype == jnp.float32
        assert loss == pixel_cross_entropy(half.astype(jnp.float32), label)


def test_more_pixels_than_a_half_precision_number_counts():
    loss = pixel_cross_entropy(jnp.zeros((1, 300, 301, 2)), jnp.zeros((1, 300, 301), jnp.uint8))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("few", [False, True])
def test_the_mean_over_devices_is_the_loss_of_the_global_batch(num_devices, few, weights):
    logits, label = random_case(2)
    label[0] = 255  # One device has nothing at all.
    if few:
        # One valid pixel in all, less than one per device.
        label[:3], label[3].flat[1:] = 255, 255
        label[3, 0, 0] = 2
    split = functools.partial(lambda x: x.reshape(num_devices, -1, *x.shape[1:]))

    def per_device(logits, label):
        value, grad = jax.value_and_grad(pixel_cross_entropy)(logits, label, axis_name="batch", class_weights=weights)
        return jax.lax.pmean(value, "batch"), grad / num_devices

    devices = jax.local_devices()[:num_devices]
    loss, grad = jax.pmap(per_device, axis_name="batch", devices=devices)(split(logits), split(label))
    expected, expected_grad = jax.value_and_grad(pixel_cross_entropy)(logits, label, class_weights=weights)
    np.testing.assert_allclose(loss, np.full(num_devices, expected), rtol=1e-6)
    np.testing.assert_allclose(grad.reshape(logits.shape), expected_grad, rtol=1e-5, atol=1e-9)
