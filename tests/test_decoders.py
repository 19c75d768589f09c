"""The improved decoder against PyTorch, its dropout, and where decoders start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxseg.convolution import conv_transpose
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder, start_at_prior

COUNTS = np.array([899, 0, 99])
# Two layers show what five would, and compile sooner.
WIDTHS = (6, 4)
KEYS = jax.random.split(jax.random.key(5), 4)


@pytest.fixture(scope="module")
def decoder():
    model = BaselineDecoder(num_classes=3, widths=(8, 8, 4, 4, 4))
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1, 1, 8)))["params"]


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
    params = start_at_prior(jax.jit(model.init)(jax.random.key(1), x[:, :1, :1])["params"], COUNTS)
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


def test_the_improved_decoder_starts_at_the_frequencies_too(improved):
    model, variables = improved
    started = start_at_prior(variables["params"], COUNTS)
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, variables["params"])
    # As at the start: nothing shifts, neither by the batch norms' biases nor by their running means.
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key not in ("bias", "mean")), {**variables, "params": started}
    )
    fresh["params"]["head"] = started["head"]
    logits = jax.jit(model.apply)(fresh, np.zeros((4, 2, 3, 8), np.float32))
    np.testing.assert_allclose(jax.nn.softmax(logits)[0, 0, 0], np.array([900, 1, 100]) / 1001, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, started["bn1"], variables["params"]["bn1"])


def random_features(number=4):
    return np.random.default_rng(0).normal(size=(number, 2, 3, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def improved():
    """An improved decoder, and variables that differ everywhere from the initial ones."""
    model = ImprovedDecoder(num_classes=3, widths=WIDTHS, dropout_rate=0.3)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.5, 0.5)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), random_features())
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def train_step(model, variables, x, keys=None, axis_name=None):
    """Logits, updated statistics, and the gradients of a loss that weighs every logit differently."""

    def loss_fn(params, x):
        logits, updates = model.apply({**variables, "params": params}, x, True, keys, mutable=["batch_stats"])
        return (logits * jnp.cos(jnp.arange(logits[0].size)).reshape(logits.shape[1:])).mean(), (logits, updates)

    gradients, (logits, updates) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(variables["params"], x)
    if axis_name is not None:
        gradients = jax.lax.pmean(gradients[0], axis_name), gradients[1]
    return logits, updates["batch_stats"], gradients


def torch_decoder(torch, variables):
    """The same layers in PyTorch, in double precision, with the same values."""
    layers = []
    params, stats = variables["params"], variables["batch_stats"]
    for index, (inputs, outputs) in enumerate(zip((8, *WIDTHS), WIDTHS, strict=False), start=1):
        conv = torch.nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
        norm = torch.nn.BatchNorm2d(outputs)
        kernel = params[f"conv_transpose{index}"]["kernel"]
        conv.weight.data = torch.tensor(kernel[::-1, ::-1].transpose(2, 3, 0, 1).copy())
        norm.weight.data, norm.bias.data = (torch.tensor(params[f"bn{index}"][name]) for name in ("scale", "bias"))
        norm.running_mean, norm.running_var = (torch.tensor(stats[f"bn{index}"][name]) for name in ("mean", "var"))
        layers += [conv, norm, torch.nn.ReLU()]
    head = torch.nn.Conv2d(WIDTHS[-1], 3, 1)
    head.weight.data = torch.tensor(params["head"]["kernel"].transpose(3, 2, 0, 1).copy())
    head.bias.data = torch.tensor(params["head"]["bias"])
    return torch.nn.Sequential(*layers, head).double()


def assert_close(got, expected, tolerance=1e-4):
    """Equal within `tolerance` of the largest magnitude."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_the_improved_decoder_equals_pytorch_in_evaluation(improved):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    model, variables = improved
    x = random_features()
    with torch.inference_mode():
        expected = torch_decoder(torch, variables).eval()(torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2))
    assert_close(jax.jit(model.apply)(variables, x), expected.permute(0, 2, 3, 1).numpy())


def test_the_improved_decoder_equals_pytorch_in_training(improved):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    model, variables = improved
    x = random_features()
    logits, stats, (gradients, x_gradient) = jax.jit(train_step, static_argnums=0)(model, variables, x)
    twin = torch_decoder(torch, variables).train()
    image = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float64, requires_grad=True)
    expected = twin(image)
    weight = torch.arange(expected[0].numel(), dtype=torch.float64).cos().reshape(8, 12, 3).permute(2, 0, 1)
    (expected * weight).mean().backward()
    assert_close(logits, expected.detach().permute(0, 2, 3, 1).numpy())
    assert_close(x_gradient, image.grad.permute(0, 2, 3, 1).numpy(), 1e-3)
    assert_close(gradients["head"]["kernel"], twin[-1].weight.grad.permute(2, 3, 1, 0).numpy(), 1e-3)
    assert_close(gradients["head"]["bias"], twin[-1].bias.grad.numpy(), 1e-3)
    for index in range(1, len(WIDTHS) + 1):
        conv, norm = twin[3 * index - 3], twin[3 * index - 2]
        kernel = conv.weight.grad.numpy().transpose(2, 3, 0, 1)[::-1, ::-1]
        assert_close(gradients[f"conv_transpose{index}"]["kernel"], kernel, 1e-3)
        assert_close(gradients[f"bn{index}"]["scale"], norm.weight.grad.numpy(), 1e-3)
        assert_close(gradients[f"bn{index}"]["bias"], norm.bias.grad.numpy(), 1e-3)
        assert_close(stats[f"bn{index}"]["mean"], norm.running_mean.numpy())
        # PyTorch divides the new variance by n - 1, Flax by n.
        pixels = len(x) * 6 * 4**index
        old = 0.9 * variables["batch_stats"][f"bn{index}"]["var"]
        assert_close(stats[f"bn{index}"]["var"], old + (norm.running_var.numpy() - old) * (pixels - 1) / pixels)


@pytest.fixture(scope="module")
def one_device(improved):
    """A training step of the whole batch, with dropout."""
    return jax.jit(train_step, static_argnums=0)(*improved, random_features(), KEYS)


@pytest.mark.parametrize("devices", [2, 4])
def test_the_improved_decoder_is_the_same_on_any_number_of_devices(improved, one_device, devices):
    """Values, statistics, gradients and what dropout drops, with the batch split or not."""
    model, variables = improved
    x, keys = random_features(), KEYS
    logits, stats, (gradients, x_gradient) = one_device
    split = model.clone(axis_name="batch")
    step = jax.pmap(
        lambda x, keys: train_step(split, variables, x, keys, "batch"), "batch", devices=jax.devices()[:devices]
    )
    got = step(x.reshape(devices, -1, *x.shape[1:]), keys.reshape(devices, -1))
    assert_close(got[0].reshape(logits.shape), logits)
    # Each device's loss is the mean over its own images.
    assert_close(got[2][1].reshape(x.shape) / devices, x_gradient, 1e-3)
    for ours, expected in ((got[1], stats), (got[2][0], gradients)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            for part in a:
                assert_close(part, b, 1e-3)


def test_dropout_is_for_training_with_keys_only(improved, one_device):
    model, variables = improved
    x = random_features()
    evaluate = jax.jit(model.apply)
    np.testing.assert_array_equal(evaluate(variables, x, keys=KEYS), evaluate(variables, x))

    def train(rate, keys):
        model = ImprovedDecoder(num_classes=3, widths=WIDTHS, dropout_rate=rate)
        return jax.jit(lambda x: model.apply(variables, x, True, keys, mutable=["batch_stats"])[0])(x)

    without, never = train(0.3, None), train(0.0, KEYS)
    np.testing.assert_allclose(without, never, rtol=1e-6)
    assert np.abs(one_device[0] - without).max() > 0.1


def test_dropout_is_just_before_the_last_convolution():
    """Without other layers, and with a head that changes nothing, what comes out is what dropout makes of the input."""
    model = ImprovedDecoder(num_classes=6, widths=(), dropout_rate=0.25)
    variables = {"params": {"head": {"kernel": jnp.eye(6)[None, None], "bias": jnp.zeros(6)}}}
    keys = jax.random.split(jax.random.key(0), 3)
    out = model.apply(variables, jnp.ones((3, 40, 50, 6)), train=True, keys=keys)
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.75], rtol=1e-6)


def test_the_baseline_takes_the_same_arguments(decoder):
    model, params = decoder
    x, keys = random_features(2), jax.random.split(jax.random.key(5), 2)
    plain = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, x, keys=keys), plain)
    in_training = jax.jit(lambda params: model.apply({"params": params}, x, train=True, keys=keys))
    np.testing.assert_array_equal(in_training(params), plain)
