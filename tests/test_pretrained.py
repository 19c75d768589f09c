"""pretrained.py: what fits goes in to the bit and comes out again, and what does not is named."""

import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxseg import checkpoint, pretrained
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.misfit import Misfit, encoder_shapes
from jaxseg.pretrained import convert_resnet, load_encoder, load_model, save_torch, to_torch
from jaxseg.resnet import VARIANTS, ResNet
from jaxseg.segmenter import Segmenter
from jaxseg.train import TrainState

NEEDS_TORCH = "needs torch==2.13.0 (CPU build)"


def random_tensors(variant="resnet18"):
    """torchvision's names and shapes with distinct values, quickly."""
    flat = {}
    for path, shape in encoder_shapes(variant).items():
        flat.setdefault(path[0], {})
        tree = flat[path[0]]
        for part in path[1:-1]:
            tree = tree.setdefault(part, {})
        seed = zlib.crc32("/".join(path).encode())
        tree[path[-1]] = np.random.default_rng(seed).random(shape, np.float32)
    return to_torch(flat)


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


def write_safetensors(path, tensors):
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
    return path


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def refusal(function, *arguments, **options):
    """The one line with which arguments are refused."""
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_leaf_is_the_tensor_of_torchvisions_name(tensors):
    got = convert_resnet(dict(tensors), "resnet18")
    params, stats = got["params"], got["batch_stats"]
    block = params["layer2_0"]
    pairs = [
        (params["bn1"]["scale"], "bn1.weight"),
        (params["bn1"]["bias"], "bn1.bias"),
        (stats["bn1"]["mean"], "bn1.running_mean"),
        (stats["layer4_1"]["bn2"]["var"], "layer4.1.bn2.running_var"),
        (block["downsample_bn"]["scale"], "layer2.0.downsample.1.weight"),
        (stats["layer2_0"]["downsample_bn"]["mean"], "layer2.0.downsample.1.running_mean"),
        (block["downsample_conv"]["kernel"][0, 0].T, "layer2.0.downsample.0.weight"),
    ]
    for leaf, name in pairs:
        np.testing.assert_array_equal(leaf, tensors[name].squeeze())
    kernel, weight = params["conv1"]["kernel"], tensors["conv1.weight"]
    for o, i, row, column in np.ndindex(*weight.shape):
        assert kernel[row, column, i, o] == weight[o, i, row, column]
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))


def torchvisions_resnet50():
    """Its state_dict, name -> shape, as torchvision/models/resnet.py builds it: independent of this package."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1": 64, "fc.weight": (1000, 2048), "fc.bias": (1000,)}
    for layer, blocks, inputs, width, outputs in (
        ("layer1", 3, 64, 64, 256),
        ("layer2", 4, 256, 128, 512),
        ("layer3", 6, 512, 256, 1024),
        ("layer4", 3, 1024, 512, 2048),
    ):
        for block in range(blocks):
            shapes |= {
                f"{layer}.{block}.conv1.weight": (width, outputs if block else inputs, 1, 1),
                f"{layer}.{block}.bn1": width,
                f"{layer}.{block}.conv2.weight": (width, width, 3, 3),
                f"{layer}.{block}.bn2": width,
                f"{layer}.{block}.conv3.weight": (outputs, width, 1, 1),
                f"{layer}.{block}.bn3": outputs,
            }
        shapes |= {f"{layer}.0.downsample.0.weight": (outputs, inputs, 1, 1), f"{layer}.0.downsample.1": outputs}
    state = {}
    for name, shape in shapes.items():
        if isinstance(shape, tuple):
            state[name] = shape
        else:
            state |= {f"{name}.{leaf}": (shape,) for leaf in ("weight", "bias", "running_mean", "running_var")}
            state[f"{name}.num_batches_tracked"] = ()
    return state


def test_torchvisions_resnet50_goes_in_and_comes_out_name_by_name(tmp_path):
    state = torchvisions_resnet50()
    # torchvision's documentation: 25,557,032 parameters; its file has 320 entries.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert len(state) == 320
    assert sum(math.prod(shape) for name, shape in state.items() if not name.endswith(statistics)) == 25_557_032
    values = {name: np.full(shape, index, np.float32) for index, (name, shape) in enumerate(state.items())}
    variables = load_encoder("resnet50", write_safetensors(tmp_path / "a.safetensors", values))
    save_torch(variables, tmp_path / "b.safetensors")
    saved = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert saved.keys() == {name for name in state if not name.startswith("fc.")}
    for name, array in saved.items():
        assert array.shape == state[name]
        if not name.endswith("num_batches_tracked"):
            assert (array == values[name]).all(), name


@pytest.mark.parametrize("variant", ["resnet18", "resnet50"])
def test_saving_and_loading_gives_the_same_bits(tmp_path, variant):
    variables = convert_resnet(random_tensors(variant), variant)
    variables["params"]["bn1"]["scale"][:3] = -0.0, 1e-45, -3.4e38
    save_torch(jax.tree.map(jnp.asarray, variables), tmp_path / "a.safetensors")
    got = load_encoder(variant, tmp_path / "a.safetensors")
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(variables), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("variant", ["resnet18", "resnet50"])
def test_what_is_saved_loads_strictly_into_torchs_network(tmp_path, variant):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    import safetensors.torch

    from tests.peers import torch_resnet

    tensors = random_tensors(variant)
    save_torch(convert_resnet(dict(tensors), variant), tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = torch_resnet.ResNet(variant)
    saved = safetensors.torch.load_file(tmp_path / "a.safetensors")
    # Of a file without versions a batch norm's counter may be missing, strict or not.
    assert saved.keys() == model.state_dict().keys()
    model.load_state_dict(saved, strict=True, assign=True)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64 and tensor.shape == ()
        else:
            np.testing.assert_array_equal(tensor.numpy(), tensors[name])


def test_what_is_saved_can_be_read_by_others_and_goes_where_a_link_leads(tmp_path, tensors):
    variables = convert_resnet(dict(tensors), "resnet18")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    before = os.umask(0o027)
    try:
        save_torch(variables, tmp_path / "link.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "link.safetensors").is_symlink()
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    assert_equal(load_encoder("resnet18", tmp_path / "link.safetensors"), variables)


@pytest.mark.parametrize(
    "header",
    [
        {"a\nb": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "X\nY", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "X" * 1000, "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1] * 101, "data_offsets": [0, 4]}},
        {"a" * 10**5: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    ],
)
def test_a_safetensors_file_that_lies_is_named_in_one_line(tmp_path, header):
    path, text = tmp_path / "a.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    message = refusal(load_encoder, "resnet18", path)
    assert message.startswith(f"{path}: ") and len(message) < 600


def test_what_the_package_says_of_a_damaged_file_is_given_in_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a":\n1}')
    message = refusal(load_encoder, "resnet18", tmp_path / "a.safetensors")
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.safe_open(tmp_path / "a.safetensors", "numpy")
    assert message.endswith(f"no safetensors file ({' '.join(str(error.value).split())})")


@pytest.mark.parametrize("name", ["a" * 5000 + ".pth", "a" * 5000 + ".safetensors"])
def test_a_path_that_cannot_be_looked_at_is_refused(tmp_path, name):
    variables = convert_resnet(random_tensors(), "resnet18")
    for function, arguments in ((load_encoder, ()), (load_model, ({"params": variables["params"]},))):
        message = refusal(function, "resnet18", tmp_path / name, *arguments)
        assert message.startswith(f"{str(tmp_path / name)[:200]}: File name too long; give ")


def test_only_an_encoder_is_saved(tmp_path, tensors):
    variables = convert_resnet(dict(tensors), "resnet18")
    assert "safetensors" in refusal(save_torch, variables, tmp_path / "a.pth")
    absent = tmp_path / "absent"
    assert f"there is no folder {absent}" in refusal(save_torch, variables, absent / "a.safetensors")
    whole = {collection: {"encoder": tree} for collection, tree in variables.items()}
    for other in (whole, {"batch_stats": variables["batch_stats"]}, {}):
        assert "none of resnet18, " in refusal(save_torch, other, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_is_saved_says_that_it_is_pytorchs(tmp_path, tensors):
    """As transformers and timm ask."""
    save_torch(convert_resnet(dict(tensors), "resnet18"), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_encoder_has_a_file_of_imagenet_weights():
    assert pretrained.IMAGENET_FILES.keys() == VARIANTS.keys()
    for name, file in pretrained.IMAGENET_FILES.items():
        assert re.fullmatch(rf"{name}-[0-9a-f]{{8}}\.pth", file)
    assert re.fullmatch(r"https://[a-z.]+/models/", pretrained.IMAGENET_URL)


def test_tensors_are_contiguous_as_safetensors_needs_them():
    kernel = np.random.default_rng(0).random((4, 4, 3, 2), np.float32)
    tensors = to_torch({"params": {"conv1": {"kernel": kernel}, "conv_transpose1": {"kernel": kernel}}})
    shapes = {name: array.shape for name, array in tensors.items()}
    assert shapes == {"conv1.weight": (2, 3, 4, 4), "conv_transpose1.weight": (3, 2, 4, 4)}
    assert all(array.flags.c_contiguous for array in tensors.values())


def test_what_pytorch_has_no_name_for_keeps_ours():
    assert list(to_torch({"params": {"mask": {"values": np.zeros(3)}}})) == ["params.mask.values"]


def test_arrays_of_jax_become_numpys():
    saved = to_torch({"params": {"decoder": {"head": {"bias": jnp.ones(2)}}}})
    assert saved.keys() == {"decoder.head.bias"} and isinstance(saved["decoder.head.bias"], np.ndarray)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "?"])
def test_numbers_of_every_type_can_be_read_and_are_refused_by_name(tmp_path, tensors, dtype):
    path = write_safetensors(tmp_path / "a.safetensors", {**tensors, "bn1.weight": np.ones(64, dtype)})
    message = refusal(load_encoder, "resnet18", path)
    assert f"not floating 1: bn1.weight is {np.dtype(dtype)}" in message


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as unopenable:  # even by root
        unopenable.bind("a.safetensors")
        message = refusal(load_encoder, "resnet18", "a.safetensors")
    remedy = "give the path of a readable .safetensors file"  # Linux's reason, or macOS's, and no more
    assert message in {f"a.safetensors: {os.strerror(code)}; {remedy}" for code in (errno.ENXIO, errno.EOPNOTSUPP)}


@pytest.mark.parametrize("error", [OSError(28, "No space left"), safetensors.SafetensorError("No space left")])
def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, tensors, monkeypatch, error):
    written = []

    def save_file(tensors, path, metadata):
        written.append(path)
        path.write_bytes(b"half")
        raise error

    variables = convert_resnet(dict(tensors), "resnet18")
    path = tmp_path / "a.safetensors"
    # What another program is just writing under such a name stays.
    other = tmp_path / "a.safetensors.part"
    other.write_bytes(b"")
    path.write_bytes(b"before")
    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            save_torch(variables, path)
        assert str(raised.value) == f"{path} cannot be written (No space left)"
    assert len(set(written)) == 2  # so that two programs do not write into one
    assert path.read_bytes() == b"before" and set(tmp_path.iterdir()) == {path, other}


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_types_are_saved_as_float32_to_the_same_numbers(tmp_path, tensors, dtype):
    variables = convert_resnet({name: array.astype(np.float16) for name, array in tensors.items()}, "resnet18")
    typed = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    save_torch(typed, tmp_path / "a.safetensors")
    assert {array.dtype for array in safetensors.numpy.load_file(tmp_path / "a.safetensors").values()} == {
        np.dtype(np.float32), np.dtype(np.int64)
    }  # fmt: skip
    assert_equal(load_encoder("resnet18", tmp_path / "a.safetensors"), jax.tree.map(np.float32, typed))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0.1, "nothing written; round them yourself"),
        (0.1, "rounded 1: bn1.bias float64"),
        (1e300, "beyond float32's range"),
        (np.nan, "inf or nan"),
        (-np.inf, "inf"),
    ],
)
def test_numbers_that_float32_cannot_hold_are_not_saved(tmp_path, tensors, number, words):
    variables = convert_resnet(dict(tensors), "resnet18")
    variables["params"]["bn1"]["bias"] = np.full(64, number)
    message = refusal(save_torch, variables, tmp_path / "a.safetensors")
    assert words in message and "bn1.bias" in message and str(tmp_path) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "number", "words"),
    [
        (np.float64, 1e39, "layer1.0.bn1.running_var beyond float32's range"),
        (np.float64, np.nan, "layer1.0.bn1.running_var inf or nan"),
        (np.float32, np.inf, "layer1.0.bn1.running_var inf or nan"),
        (np.float16, -np.inf, "layer1.0.bn1.running_var inf or nan"),
        (ml_dtypes.bfloat16, np.nan, "layer1.0.bn1.running_var inf or nan"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path, tensors, dtype, number, words):
    changed = {name: array.astype(dtype) for name, array in tensors.items()}
    changed["layer1.0.bn1.running_var"][7] = number
    changed["conv1.weight"][1, 2, 3, 4] = number
    path = write_safetensors(tmp_path / "a.safetensors", changed)
    message = refusal(load_encoder, "resnet18", path)
    assert words in message and "not finite 2: conv1.weight " in message and str(path) in message


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floating_types_become_float32(tmp_path, tensors, dtype):
    """Also those of two bytes, which the safetensors package hands over in types of its own choice."""
    narrow = {name: array.astype(dtype) for name, array in tensors.items()}
    expected = convert_resnet({name: array.astype(np.float32) for name, array in narrow.items()}, "resnet18")
    assert_equal(load_encoder("resnet18", write_safetensors(tmp_path / "a.safetensors", narrow)), expected)
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    typed = {
        name: torch.tensor(array.astype(np.float64)).to(getattr(torch, np.dtype(dtype).name))
        for name, array in narrow.items()
    }
    torch.save(typed, tmp_path / "a.pt")
    assert_equal(load_encoder("resnet18", tmp_path / "a.pt"), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "backbone.", "module.encoder."])
def test_a_prefix_and_what_an_encoder_does_not_need_are_left_out(tmp_path, tensors, prefix):
    more = {"fc.weight": np.zeros((1000, 512)), "fc.bias": np.zeros(1000), "bn1.num_batches_tracked": np.array(3)}
    prefixed = {prefix + name: array for name, array in (tensors | more).items()}
    if prefix.endswith(("encoder.", "backbone.")):
        prefixed |= {prefix.replace("encoder.", "").replace("backbone.", "") + "decoder.conv.weight": np.zeros(3)}
    path = write_safetensors(tmp_path / "a.safetensors", prefixed)
    assert_equal(load_encoder("resnet18", path), convert_resnet(dict(tensors), "resnet18"))


def test_beside_a_prefix_that_names_no_part_nothing_is_left_out(tmp_path, tensors):
    prefixed = {f"module.{name}": array for name, array in tensors.items()} | {"extra": np.zeros(3)}
    message = refusal(load_encoder, "resnet18", write_safetensors(tmp_path / "a.safetensors", prefixed))
    assert "(unexpected 1: 'extra' (3,))" in message


@pytest.mark.parametrize("is_zip", [True, False])
def test_torchs_files_with_a_prefix_load_too(tmp_path, tensors, is_zip):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    state = {f"module.{name}": torch.tensor(array) for name, array in tensors.items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    assert_equal(load_encoder("resnet18", tmp_path / "a.pth"), convert_resnet(dict(tensors), "resnet18"))


def test_of_two_networks_in_a_file_none_is_taken(tmp_path, tensors):
    both = {f"{prefix}.{name}": array for prefix in ("encoder", "backbone") for name, array in tensors.items()}
    message = refusal(load_encoder, "resnet18", write_safetensors(tmp_path / "a.safetensors", both))
    assert "missing 100" in message and "unexpected 200" in message
    some = {f"encoder.{name}": array for name, array in tensors.items()} | {"backbone.conv1.a\nb": np.zeros(1)}
    assert "unexpected 101" in refusal(load_encoder, "resnet18", write_safetensors(tmp_path / "b.safetensors", some))


@pytest.mark.parametrize("name", ["conv1.weight", "layer3.1.bn2.running_var", "layer2.0.downsample.0.weight"])
def test_a_missing_tensor_is_named_with_its_shape(tensors, name):
    rest = {other: array for other, array in tensors.items() if other != name}
    message = refusal(convert_resnet, rest, "resnet18")
    assert f"missing 1: {name} {tensors[name].shape})" in message


@pytest.mark.parametrize(
    "name", ["fc.gain", "layer2.2.conv1.weight", "xfc.weight", "num_batches", "head.fc.bias", "a\nb", "a" * 1000]
)
def test_an_unexpected_tensor_is_named_with_its_shape(tensors, name):
    message = refusal(convert_resnet, tensors | {name: np.zeros((3, 2))}, "resnet18")
    assert "unexpected 1: " in message and repr(name)[:100] in message
    assert len(message) < 400 and (len(name) > 100 or f"{name!r} (3, 2)" in message)


def test_a_misshaped_tensor_is_named_with_both_shapes(tensors):
    """The same number of elements in another order, or with another rank: nothing is reshaped to fit."""
    changed = dict(tensors)
    changed["conv1.weight"] = tensors["conv1.weight"].transpose(1, 0, 2, 3)
    changed["bn1.weight"] = tensors["bn1.weight"][None]
    message = refusal(convert_resnet, changed, "resnet18")
    assert "misshaped 2: " in message
    assert "conv1.weight is (3, 64, 7, 7) and should be (64, 3, 7, 7)" in message
    assert "bn1.weight is (1, 64) and should be (64,)" in message


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64])
def test_numbers_of_another_kind_are_refused(tensors, dtype):
    changed = tensors | {"bn1.bias": np.zeros(64, dtype)}
    assert f"not floating 1: bn1.bias is {np.dtype(dtype)}" in refusal(convert_resnet, changed, "resnet18")


def test_all_faults_are_named_and_of_very_many_the_first(tensors):
    changed = {name: array for name, array in tensors.items() if "layer4.1" not in name}
    misshaped = [name for name in changed if name.startswith("layer1.1")]
    changed |= {name: np.zeros((2, 3)) for name in misshaped}
    changed |= {f"extra{number}": np.zeros(number) for number in range(12)}
    message = refusal(convert_resnet, changed, "resnet18")
    for name in tensors.keys() - changed.keys():
        assert f" {name} {tensors[name].shape}" in message
    for name in misshaped:
        assert f" {name} is (2, 3) and should be {tensors[name].shape}" in message
    assert "unexpected 12: " in message and "'extra11' (11,)" in message
    with pytest.raises(Misfit) as error:
        convert_resnet({"a": np.zeros(1)}, "resnet152")
    message = str(error.value)
    assert "missing 775: conv1.weight (64, 3, 7, 7), " in message and " and 755 more; unexpected 1: 'a' (1,)" in message
    assert len(message) < 1500
    assert len(error.value.faults["missing"]) == 775 and error.value.faults["unexpected"] == ["'a' (1,)"]


@pytest.mark.parametrize(
    ("given", "wanted"), [("resnet50", "resnet18"), ("resnet18", "resnet34"), ("resnet34", "resnet18")]
)
def test_the_encoder_that_fits_is_suggested(tmp_path, given, wanted):
    shapes = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in random_tensors(given).items()}
    assert f"these look like {given}'s: use --encoder {given} (" in refusal(convert_resnet, dict(shapes), wanted)
    # One tensor less: nearest, but not without saying so.
    del shapes["bn1.bias"]
    message = refusal(convert_resnet, dict(shapes), wanted)
    assert f"the nearest encoder is {given}, of whose tensors 1 do not fit (" in message
    assert message.count("use --encoder") == 0
    assert f"weights of a {given} (" in refusal(convert_resnet, dict(shapes), given)


def test_no_encoder_is_suggested_where_few_tensors_fit(tensors):
    for given in (
        {"a": np.zeros(1)},
        {f"net.{name}": array for name, array in tensors.items() if "layer1" not in name},
    ):
        message = refusal(convert_resnet, given, "resnet50")
        assert "give torchvision's or timm's weights of a resnet50 (" in message and "resnet18" not in message
    # The same names with other shapes do not make a ResNet either.
    wide = {
        name: np.broadcast_to(np.float32(0), (2 * array.shape[0], *array.shape[1:])) for name, array in tensors.items()
    }
    assert "weights of a resnet50 (" in refusal(convert_resnet, wide, "resnet50")
    # The tensor that is wanted counts where its shape does: of a ResNet-34's names most are a ResNet-50's too.
    shapes = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in random_tensors("resnet34").items()}
    assert "--encoder resnet34" in refusal(convert_resnet, shapes, "resnet50")


@pytest.mark.parametrize("prefix", ["model.", "net.features.", "module.model."])
def test_a_prefix_that_is_in_the_way_is_named(tmp_path, tensors, prefix):
    prefixed = {prefix + name: array for name, array in tensors.items()} | {"head.weight": np.zeros(3)}
    path = write_safetensors(tmp_path / "a.safetensors", prefixed)
    message = refusal(load_encoder, "resnet18", path)
    assert f"without the prefix {prefix!r} they are resnet18's: save them under names without it (" in message
    assert "names without it and use --encoder resnet18 (" in refusal(load_encoder, "resnet34", path)
    two = {f"teacher.{name}": array for name, array in tensors.items()} | prefixed
    assert f"without the prefix 'teacher.' or {prefix!r} they" in refusal(convert_resnet, two, "resnet18")


def test_an_unknown_encoder_is_answered_with_the_list():
    assert "resnet18, resnet34, resnet50, resnet101, resnet152" in refusal(load_encoder, "resnet20", "imagenet")
    assert "resnet18, resnet34" in refusal(convert_resnet, {}, "resnet20")


def test_a_damaged_safetensors_file_is_refused_at_every_length(tmp_path):
    whole = write_safetensors(tmp_path / "whole.safetensors", {"a": np.zeros(20, np.float32)}).read_bytes()
    path = tmp_path / "part.safetensors"
    bomb = (2**60).to_bytes(8, "little") + b"{}"
    for content in [*(whole[:size] for size in range(len(whole))), bomb, whole + b"0"]:
        path.write_bytes(content)
        message = refusal(load_encoder, "resnet18", path)
        assert str(path) in message and "truncated" in message and len(message) < 300


def test_what_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path / "absent.pth"):
        message = refusal(load_encoder, "resnet18", path)
        assert str(path) in message and "No such file" in message and "workdir of a run" in message
    unreadable = tmp_path / "a.safetensors" / "b"
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert str(unreadable) in refusal(load_encoder, "resnet18", unreadable)
    # One byte per number, of a kind NumPy does not have.
    header = b'{"a\\n":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    message = refusal(load_encoder, "resnet18", path)
    assert str(path) in message and "F8_E4M3" in message and "float32" in message


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("one_storage", [False, True], ids=["apart", "views of one storage"])
def test_loading_needs_little_more_memory_than_the_file(tmp_path, tensors, kind, dtype, one_storage):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    state = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in tensors.items()}
    if one_storage:
        flat, place = torch.cat([tensor.flatten() for tensor in state.values()]), 0
        for name, tensor in state.items():
            state[name] = flat[place : place + tensor.numel()].view(tensor.shape)
            place += tensor.numel()
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    assert peak_of_loading(path) < 2.5 * path.stat().st_size


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_loading_safetensors_needs_little_more_memory_than_the_file(tmp_path, tensors, dtype):
    path = write_safetensors(tmp_path / "a.safetensors", {name: a.astype(dtype) for name, a in tensors.items()})
    assert peak_of_loading(path) < 2.5 * path.stat().st_size


def peak_of_loading(path):
    """The most bytes that were allocated at once; the file itself, where it is mapped, is none of them."""
    tracemalloc.start()
    try:
        load_encoder("resnet18", path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_home_folder_is_found(tmp_path, tensors, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    variables = convert_resnet(dict(tensors), "resnet18")
    save_torch(variables, "~/a.safetensors")
    assert (tmp_path / "a.safetensors").is_file()
    assert_equal(load_encoder("resnet18", "~/a.safetensors"), variables)
    assert "only the encoder" in refusal(load_model, "resnet18", "~/a.safetensors", {})
    assert "~nobody-of-this-name/a.pth" in refusal(load_encoder, "resnet18", "~nobody-of-this-name/a.pth")


def test_files_of_weights_are_read_without_importing_orbax():
    code = "import sys; from jaxseg import pretrained; print('orbax' in sys.modules, 'jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False True"


def test_the_shared_weights_fill_the_encoder(shared):
    path = shared / "weights" / "resnet18-9f26ff83.pth"
    got, tensors = load_encoder("resnet18", path), pretrained.read_torch(path)
    np.testing.assert_array_equal(
        got["params"]["layer4_0"]["downsample_conv"]["kernel"][0, 0],
        tensors["layer4.0.downsample.0.weight"][:, :, 0, 0].T,
    )
    assert "use --encoder resnet18" in refusal(load_encoder, "resnet50", path)


@pytest.fixture(scope="module")
def segmenter():
    """The shapes of a segmenter's variables for a number of classes."""

    def shapes(num_classes):
        model = Segmenter(ResNet(), BaselineDecoder(num_classes))
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))

    return shapes


@pytest.fixture(scope="module")
def run(tmp_path_factory, segmenter):
    """The workdir of a run with two checkpoints, and the variables of the better, which is not the last."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    generator = np.random.default_rng(0)
    models = [
        jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape, np.float32), segmenter(5)) for _ in range(2)
    ]
    with checkpoint.open_checkpoints(workdir / "checkpoints") as manager:
        for step, (model, score) in enumerate(zip(models, (0.5, 0.3), strict=True), start=1):
            state = TrainState(np.array(step), model["params"], model["batch_stats"], {})
            checkpoint.save(manager, state, score, {})
    return workdir, models[0]


def test_a_runs_best_encoder_is_loaded(run):
    workdir, best = run
    encoder = {collection: tree["encoder"] for collection, tree in best.items()}
    # What another program is just writing stays.
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-0"
    unfinished.mkdir(exist_ok=True)
    for path in (workdir, workdir / "checkpoints", str(workdir)):
        assert_equal(load_encoder("resnet18", path), encoder)
    assert unfinished.is_dir()


def test_one_checkpoint_of_a_run_is_loaded_whether_it_is_the_best_or_not(run, segmenter, tmp_path, monkeypatch):
    workdir, best = run
    first, second = (load_model("resnet18", workdir / "checkpoints" / number, segmenter(5)) for number in "12")
    assert_equal(first, best)
    assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])
    encoder = {collection: tree["encoder"] for collection, tree in second.items()}
    assert_equal(load_encoder("resnet18", workdir / "checkpoints" / "2"), encoder)
    monkeypatch.chdir(workdir / "checkpoints" / "2")
    assert_equal(load_encoder("resnet18", "."), encoder)
    # A run may have a number for a name, and so may a folder of checkpoints, or one of nothing.
    for source, name in ((workdir, "2"), (workdir / "checkpoints", "02")):
        numbered = shutil.copytree(source, tmp_path / name)
        assert_equal(load_model("resnet18", numbered, segmenter(5)), best)
    (tmp_path / "3").mkdir()
    assert "holds no checkpoint" in refusal(load_encoder, "resnet18", tmp_path / "3")


def test_a_checkpoint_from_before_checksums_is_read_and_said_to_be_unchecked(run, segmenter, tmp_path, capsys):
    workdir, best = run
    older = shutil.copytree(workdir, tmp_path / "older")
    for meta in older.glob("checkpoints/*/meta/metadata"):
        meta.write_text(
            json.dumps({name: value for name, value in json.loads(meta.read_text()).items() if name != "checksums"})
        )
    for path in (older, older / "checkpoints" / "1"):
        assert_equal(load_model("resnet18", path, segmenter(5)), best)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "no checksums" in said and str(older / "checkpoints" / "1") in said


def test_reading_a_run_says_nothing(run, caplog, capfd):
    load_encoder("resnet18", run[0])
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_all_of_a_run_is_loaded(run, segmenter):
    workdir, best = run
    assert_equal(load_model("resnet18", workdir, segmenter(5)), best)


def test_a_run_that_does_not_fit_is_refused(run, segmenter, tmp_path):
    workdir, _ = run
    message = refusal(load_model, "resnet18", workdir, segmenter(7))
    assert "params.head.kernel is (1, 1, 16, 5) and should be (1, 1, 16, 7)" in message and str(workdir) in message
    assert "should be (1, 1, 16, 3)" in refusal(load_model, "resnet18", workdir, segmenter(3))
    assert "params.head.bias" in message and "--weights-scope encoder" in message and "as many classes" in message
    model = Segmenter(ResNet(), ImprovedDecoder(5))
    improved = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    message = refusal(load_model, "resnet18", workdir, improved)
    assert "missing 20: " in message and "params.bn1.scale (256,)" in message and "batch_stats.bn5.var (16,)" in message
    assert "the experiment that trained it" in message and "classes" not in message
    for function, arguments in ((load_encoder, ()), (load_model, (segmenter(5),))):
        assert "use --encoder resnet18" in refusal(function, "resnet50", workdir, *arguments)
        assert "holds no checkpoint" in refusal(function, "resnet18", tmp_path, *arguments)
    assert "only the encoder" in refusal(load_model, "resnet18", tmp_path / "a.pth", segmenter(5))


def test_the_faults_have_their_kinds(run, segmenter, tmp_path, tensors):
    with pytest.raises(Misfit) as misshaped:
        load_model("resnet18", run[0], segmenter(7))
    assert len(misshaped.value.faults["misshaped"]) == 2
    for value, kind in ((np.nan, "not finite"), (0.1, "rounded")):
        variables = convert_resnet(dict(tensors), "resnet18")
        variables["params"]["conv1"]["kernel"] = np.full((7, 7, 3, 64), value)
        with pytest.raises(Misfit) as misfit:
            save_torch(variables, tmp_path / "a.safetensors")
        assert len(misfit.value.faults[kind]) == 1


def test_a_decoder_that_is_not_finite_is_refused(run, segmenter, monkeypatch):
    workdir, model = run
    model = jax.tree.map(np.copy, model)
    model["params"]["decoder"]["head"]["bias"][1] = np.nan
    monkeypatch.setattr(pretrained, "_read_run", lambda _: model)
    assert "decoder params.head.bias inf or nan" in refusal(load_model, "resnet18", workdir, segmenter(5))


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    workdir, _ = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    data = max((path for path in (copy / "checkpoints" / "1").rglob("*") if path.is_file()), key=os.path.getsize)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    message = refusal(load_encoder, "resnet18", copy)
    assert str(copy) in message and "is damaged" in message
