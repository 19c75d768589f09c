"""The table of a model's layers, and the figure of its architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from jaxseg import plots
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.plots import architecture
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter
from jaxseg.summary import Layer, format_summary, list_layers


@pytest.fixture(scope="module")
def model():
    return Segmenter(ResNet(axis_name="batch"), ImprovedDecoder(9, axis_name="batch"))


@pytest.fixture(scope="module")
def layers(model):
    return list_layers(model, (352, 448))


def test_every_parameter_is_in_one_row(model, layers):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))["params"]
    expected: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(part.key for part in path[:-1])
        expected[name] = expected.get(name, 0) + leaf.size
    assert {layer.name: layer.parameters for layer in layers} == expected
    assert len(layers) == len(expected)


def test_layers_are_listed_in_order_with_the_reports_shapes(layers):
    assert layers[0] == Layer("encoder/conv1", "Conv", (176, 224, 64), 7 * 7 * 3 * 64)
    assert layers[-1] == Layer("decoder/head", "Conv", (352, 448, 9), 16 * 9 + 9)
    shapes = {layer.name: layer.shape for layer in layers}
    assert shapes["encoder/layer4_1/conv2"] == (11, 14, 512)
    widths = [shapes[f"decoder/conv_transpose{index}"] for index in range(1, 6)]
    assert widths == [(22, 28, 256), (44, 56, 128), (88, 112, 64), (176, 224, 32), (352, 448, 16)]
    names = [layer.name for layer in layers]
    assert names.index("decoder/conv_transpose1") < names.index("decoder/bn1") < names.index("decoder/conv_transpose2")


def test_nothing_is_computed():
    class Enormous(nn.Module):
        @nn.compact
        def __call__(self, image):
            return nn.Dense(2)(image.astype(jnp.float32))

    # Its input alone would be 30 GB.
    assert list_layers(Enormous(), (10**5, 10**5)) == [Layer("Dense_0", "Dense", (10**5, 10**5, 2), 8)]


def test_the_table_has_equal_columns_and_the_totals():
    layers = [Layer("encoder/conv1", "Conv", (4, 5, 6), 1234), Layer("decoder/head", "Conv", (8, 10, 2), 1)]
    assert format_summary(layers).splitlines() == [
        "layer          kind  output  parameters",
        "---------------------------------------",
        "encoder/conv1  Conv   4x5x6       1,234",
        "decoder/head   Conv  8x10x2           1",
        "---------------------------------------",
        "encoder                           1,234",
        "decoder                               1",
        "all                               1,235",
    ]


def test_blocks_are_the_sizes_between_image_and_logits(layers):
    blocks = [tuple(block) for block in architecture.group_layers(layers)]
    encoder = [("conv1", 176, 224, 64), ("layer1", 88, 112, 64), ("layer2", 44, 56, 128), ("layer3", 22, 28, 256)]
    decoder = [(f"conv_transpose{i}", 11 * 2**i, 14 * 2**i, 512 // 2**i) for i in range(1, 6)]
    assert blocks == [
        *(("encoder", name, tuple(shape)) for name, *shape in [*encoder, ("layer4", 11, 14, 512)]),
        *(("decoder", name, tuple(shape)) for name, *shape in [*decoder, ("head", 352, 448, 9)]),
    ]


def test_a_block_has_the_shape_of_its_last_layer():
    """As in a bottleneck, whose first convolution has other channels, and the size of the stage before."""
    shapes = {
        "encoder/layer1_0/conv1": (8, 8, 64), "encoder/layer1_0/conv3": (8, 8, 256),
        "encoder/layer2_0/conv1": (8, 8, 128), "encoder/layer2_0/conv3": (4, 4, 512),
        "decoder/conv_transpose1": (8, 8, 5), "decoder/other": (8, 8, 6), "decoder/head": (8, 8, 9),
    }  # fmt: skip
    blocks = architecture.group_layers([Layer(name, "Conv", shape, 1) for name, shape in shapes.items()])
    assert [tuple(block) for block in blocks] == [
        ("encoder", "layer1", (8, 8, 256)),
        ("encoder", "layer2", (4, 4, 512)),
        ("decoder", "conv_transpose1", (8, 8, 6)),
        ("decoder", "head", (8, 8, 9)),
    ]


@pytest.mark.filterwarnings("error")
def test_the_figure_writes_every_size_and_stays_on_its_page(layers, tmp_path, monkeypatch):
    texts, write = [], architecture.write

    def listen(page, x, y, text, *args, **style):
        texts.append((text, x))
        write(page, x, y, text, *args, **style)

    monkeypatch.setattr(architecture, "write", listen)
    plots.plot_architecture(layers, (352, 448), "a title", tmp_path / "a.png")
    written = [text for text, _ in texts]
    # Image, conv_transpose5 and head have the full size.
    assert written.count("352x448") == 3 and written.count("176x224") == 2 and written.count("11x14") == 1
    assert [text for text in written if text in ("x512", "x16", "x9")] == ["x512", "x16", "x9"]
    for part, total in (("encoder", 11_176_512), ("decoder", 2_794_617)):
        assert f"{part}: {total:,} parameters" in written
    assert "ConvTranspose, BatchNorm, Conv" in written
    places = dict(texts)
    assert places["image"] < places["layer1"] < places["transpose1"] < places["head"]
    with Image.open(tmp_path / "a.png") as image:
        drawn = np.asarray(image.convert("RGB")).astype(int)
    assert drawn.shape[1] == pytest.approx(1440, abs=2)
    for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
        assert (edge == 255).all()


def test_the_baselines_figure_has_no_batch_norm_in_the_decoder(tmp_path, monkeypatch):
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return {32: nn.Conv(4, (32, 32), strides=32, name="conv1")(x)}

    rows = list_layers(Segmenter(Encoder(), BaselineDecoder(3, widths=(4, 4, 4, 4, 4))), (32, 40))
    written = []
    monkeypatch.setattr(architecture, "write", lambda page, x, y, text, *a, **k: written.append(text))
    plots.plot_architecture(rows, (32, 40), "", tmp_path / "a.png")
    assert "ConvTranspose, Conv" in written
    # 40 columns are padded to 64 inside the model.
    assert "32x40" in written and written.count("32x64") == 2
