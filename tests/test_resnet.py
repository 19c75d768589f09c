"""The encoders against PyTorch's numbers."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.settings import Settings
from jaxseg import initializers
from jaxseg.pretrained import convert_resnet, encoder_shapes, load_encoder, to_torch
from jaxseg.resnet import VARIANTS, BasicBlock, Bottleneck, ResNet
from jaxseg.segmenter import normalise

NEEDS_TORCH = "needs torch==2.13.0 (CPU build)"
# torchvision's documentation: parameters with the classifier, and the features before it.
PARAMETERS = {
    "resnet18": (11_689_512, 512),
    "resnet34": (21_797_672, 512),
    "resnet50": (25_557_032, 2048),
    "resnet101": (44_549_160, 2048),
    "resnet152": (60_192_808, 2048),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=NEEDS_TORCH)


def random_image(height, width):
    return np.random.default_rng(height).normal(size=(2, height, width, 3)).astype(np.float32)


def relative_error(value, expected):
    """max|a - b| / max|b|, for (N, H, W, C) and (N, C, H, W)."""
    expected = expected.detach().permute(0, 2, 3, 1).numpy()
    assert value.shape == expected.shape
    return np.abs(value - expected).max() / np.abs(expected).max()


def test_the_options_are_the_variants():
    assert typing.get_args(typing.get_type_hints(Settings)["encoder"]) == tuple(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_parameters_have_torchvisions_shapes(variant):
    model = ResNet(variant)
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    paths = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
    assert paths == encoder_shapes(variant)
    total, channels = PARAMETERS[variant]
    assert sum(leaf.size for leaf in jax.tree.leaves(template["params"])) == total - 1000 * (channels + 1)
    features = jax.eval_shape(model.apply, template, jnp.zeros((2, 45, 70, 3)))
    # Each halving rounds up.
    sizes = {2: (23, 35), 4: (12, 18), 8: (6, 9), 16: (3, 5), 32: (2, 3)}
    assert {stride: value.shape[1:3] for stride, value in features.items()} == sizes
    assert [features[stride].shape[3] for stride in (4, 8, 16, 32)] == [channels // 8 * 2**group for group in range(4)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_equals_pytorchs_at_every_stride(torch, variant):
    from tests.peers import torch_resnet

    tensors = torch_resnet.random_tensors(variant)
    image = random_image(40, 56)
    twin = torch_resnet.load(variant, tensors).eval()
    with torch.inference_mode():
        expected = twin(torch.from_numpy(image).permute(0, 3, 1, 2))
    variables = convert_resnet(tensors, variant)
    features = jax.jit(ResNet(variant).apply)(variables, image)
    assert features.keys() == expected.keys() == {2, 4, 8, 16, 32}
    for stride, value in features.items():
        assert relative_error(value, expected[stride]) <= 1e-4, stride


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def trained(torch, request):
    """One pass in training mode, forward and backward, in float64, by both; with the number of values per channel.

    Of the ResNet-50's blocks it has both kinds, and each stride: compiling all sixteen takes most of a minute.
    """
    from tests.peers import torch_resnet

    variant = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "resnet50", (Bottleneck, (2, 1, 2, 1)))
        patch.setitem(torch_resnet.VARIANTS, "resnet50", ((2, 1, 2, 1), True))
        return train_both(torch, variant)


def train_both(torch, variant):
    from tests.peers import torch_resnet

    image = random_image(40, 56).astype(np.float64)
    tensors = torch_resnet.random_tensors(variant)
    twin = torch_resnet.load(variant, tensors).double().train()
    counts = {}
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: counts.update({name: inputs[0][:, 0].numel()})
            )
    expected = twin(torch.from_numpy(image).permute(0, 3, 1, 2))
    generator = np.random.default_rng(0)
    # Random weights for every feature map, so that no gradient is a sum in which errors cancel.
    weights = {stride: generator.normal(size=value.permute(0, 2, 3, 1).shape) for stride, value in expected.items()}
    loss = sum(
        (value * torch.from_numpy(weights[stride]).permute(0, 3, 1, 2)).mean() for stride, value in expected.items()
    )
    loss.backward()

    def loss_fn(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        features, updates = ResNet(variant, dtype=jnp.float64).apply(
            variables, image, train=True, mutable="batch_stats"
        )
        loss = sum((value * weights[stride]).mean() for stride, value in features.items())
        return loss, (features, updates["batch_stats"])

    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), convert_resnet(tensors, variant))
        grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True))
        arguments = variables["params"], variables["batch_stats"]
        grads, (features, stats) = grad_fn(*arguments)
        ours = to_torch({"params": grads}) | to_torch({"batch_stats": stats})
        features = {stride: np.asarray(value) for stride, value in features.items()}
    before = torch_resnet.random_tensors(variant)
    return twin, expected, features, ours, before, counts


def test_training_outputs_equal_pytorchs(trained):
    _, expected, features, *_ = trained
    for stride, value in features.items():
        assert value.dtype == np.float64
        assert relative_error(value, expected[stride]) <= 1e-10, stride


def test_batch_statistics_are_those_of_all_devices(monkeypatch):
    # Every layer that there is, each once.
    monkeypatch.setitem(VARIANTS, "resnet18", (BasicBlock, (1, 1, 1, 1)))
    model = ResNet(axis_name="batch")
    image = np.stack([random_image(40, 56)[0] * (index + 1) / 4 for index in range(4)])
    variables = initializers.init(model, jax.random.key(0), image[:1])

    def features_of(parts):
        apply = jax.vmap(
            lambda part: model.apply(variables, part, train=True, mutable="batch_stats"), axis_name="batch"
        )
        return jax.jit(apply)(image.reshape(parts, -1, *image.shape[1:]))

    (one, one_stats), (four, four_stats) = features_of(1), features_of(4)

    def error(value, expected):
        return np.abs(value - expected).max() / np.abs(expected).max()

    for stride, value in one.items():
        assert error(four[stride].reshape(value[0].shape), value[0]) <= 1e-4, stride
    errors = jax.tree.leaves(jax.tree.map(lambda four, one: error(four[3], one[0]), four_stats, one_stats))
    assert max(errors) <= 1e-4


def test_gradients_equal_pytorchs(trained):
    twin, _, _, ours, *_ = trained
    for name, parameter in twin.named_parameters():
        expected = parameter.grad.numpy()
        assert ours[name].dtype == np.float64
        assert np.abs(ours[name] - expected).max() <= 1e-10 * np.abs(expected).max(), name


def test_updated_means_equal_pytorchs_and_variances_are_the_biased_ones(trained):
    """PyTorch's update takes the batch's variance times n / (n - 1), ours the variance by which it divided."""
    twin, _, _, ours, before, counts = trained
    theirs = {name: buffer.numpy() for name, buffer in twin.named_buffers()}
    assert min(counts.values()) == 2 * 2 * 2
    for norm, count in counts.items():
        np.testing.assert_allclose(ours[f"{norm}.running_mean"], theirs[f"{norm}.running_mean"], rtol=1e-10, atol=1e-12)
        old = before[f"{norm}.running_var"].astype(np.float64)
        unbiased = (theirs[f"{norm}.running_var"] - 0.9 * old) / 0.1
        expected = 0.9 * old + 0.1 * unbiased * (count - 1) / count
        np.testing.assert_allclose(ours[f"{norm}.running_var"], expected, rtol=1e-10)


def test_pretrained_features_equal_pytorch_at_every_stride(shared):
    variables = load_encoder("resnet18", shared / "weights" / "resnet18-9f26ff83.pth")
    reference = np.load(shared / "reference" / "resnet18_features.npz")
    features = jax.jit(ResNet().apply)(variables, normalise(reference["image"]))
    for stride, value in features.items():
        # The two finest maps are stored at every fourth row and column.
        value = value[:, ::4, ::4] if stride <= 4 else value
        expected = reference[f"stride{stride}"]
        assert value.shape == expected.shape
        assert np.abs(value - expected).max() / np.abs(expected).max() <= 1e-4
