"""A model leaves as one file that runs without this package, and as tensors that PyTorch takes."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from PIL import Image

from experiments.export import main
from jaxseg import inference
from jaxseg.data.labels import Labels
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.export import export_program
from jaxseg.layers import Conv, max_pool
from jaxseg.pretrained import convert_resnet, load_encoder
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter
from tests.peers.saved_run import META, WIDTHS, save_run
from tests.peers.small_run import SmallEncoder

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What runs a program where neither this package nor flax can be imported.
ALONE = "import sys; sys.modules['jaxseg'] = sys.modules['flax'] = sys.modules['experiments'] = None\n"


class Encoder(nn.Module):
    """The layers of a ResNet, few and narrow: down to stride 32, with maps smaller than a kernel at the end."""

    @nn.compact
    def __call__(self, x, train=False):
        x = max_pool(nn.relu(Conv(8, (7, 7), 2, 3)(x)))
        for _ in range(3):
            x = nn.relu(nn.BatchNorm(not train)(Conv(8, (3, 3), 2, 1)(x)))
        return {32: x}


def random_variables(module, *inputs):
    """Variables that are nowhere at their initial value, so that class maps have several classes."""
    rng = np.random.default_rng(0)
    variables = jax.jit(module.init)(jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), variables)


@pytest.fixture(scope="module")
def model():
    return Segmenter(Encoder(), ImprovedDecoder(5, WIDTHS))


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model, np.zeros((1, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def program(model, variables):
    return export_program(model, variables)


def images(number, height, width):
    return np.random.default_rng(height).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def test_a_program_gives_the_models_class_map_at_any_size_without_jaxseg_and_flax(tmp_path, program, model, variables):
    sizes = [(1, 32, 32), (3, 64, 96), (2, 160, 32)]
    (tmp_path / "program").write_bytes(program)
    for index, size in enumerate(sizes):
        np.save(tmp_path / f"image{index}.npy", images(*size))
    code = f"""{ALONE}
import numpy as np
from jax import export
program = export.deserialize(open("program", "rb").read())
for index in range({len(sizes)}):
    np.save(f"classes{{index}}.npy", program.call(np.load(f"image{{index}}.npy")))
assert not any(name.partition(".")[0] in ("jaxseg", "flax") for name, module in sys.modules.items() if module)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for index, size in enumerate(sizes):
        expected = jax.jit(model.apply)(variables, images(*size)).argmax(-1)
        classes = np.load(tmp_path / f"classes{index}.npy")
        assert classes.dtype == np.uint8 and len(np.unique(classes)) > 2
        np.testing.assert_array_equal(classes, expected)


def test_a_program_holds_the_forms_of_cpu_and_cuda(program):
    loaded = export.deserialize(program)
    assert loaded.platforms == ("cpu", "cuda") and not loaded.disabled_safety_checks
    text = loaded.mlir_module()
    # A transposed convolution: for a CPU one of 2x2 that gives blocks of 2x2, for a GPU one of 4x4 of a dilated input.
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert any("tensor<2x2x8x32xf32>" in line for line in convolutions)
    assert any("tensor<4x4x8x8xf32>" in line and "lhs_dilate = [2, 2]" in line for line in convolutions)


def test_a_program_says_which_sizes_it_takes(program):
    with pytest.raises(ValueError, match=re.escape("(n, 32*h, 32*w, 3)")):
        export.deserialize(program).call(np.zeros((1, 33, 32, 3), np.uint8))


def read_snippet():
    """The README's lines that run a program."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "export.deserialize" in block)


def test_the_readmes_lines_run_what_the_command_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "ResNet", SmallEncoder)
    save_run(tmp_path / "run", BaselineDecoder(3, WIDTHS))
    output = tmp_path / "model.stablehlo"
    output.write_bytes(b"an older one")
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    about = json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert about["names"] == META["names"] and about["colours"] == META["colours"]
    assert about["image_size"] == [32, 64] and about["decoder"] == "BaselineDecoder"
    assert about["checkpoint"] == {"stage_name": "stage 2: everything", "epoch": 1, "score": 0.5}
    last = ["--output", str(tmp_path / "last"), "--checkpoint", "last"]
    assert main([str(tmp_path / "run"), *last]) == 0
    assert json.loads((tmp_path / "last.json").read_text())["checkpoint"]["epoch"] == 2
    image = images(1, 352, 448)[0]
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=95)
    code = f"{ALONE}{read_snippet()}\nnp.save('classes.npy', classes)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    trained = inference.load_run(tmp_path / "run")
    logits = trained.model.apply(trained.variables, np.asarray(Image.open(tmp_path / "photo.jpg"))[None])
    np.testing.assert_array_equal(np.load(tmp_path / "classes.npy"), logits[0].argmax(-1))


@pytest.fixture(scope="module")
def encoder():
    """A ResNet-18's variables, an image, and what the encoder makes of it."""
    torch_resnet = pytest.importorskip("tests.peers.torch_resnet", reason="needs torch==2.13.0 (CPU build)")
    variables = convert_resnet(torch_resnet.random_tensors("resnet18"), "resnet18")
    image, model = images(2, 70, 96), Segmenter(ResNet("resnet18"), BaselineDecoder(5))
    encode = jax.jit(lambda variables, image: model.apply(variables, image, method="encode"))
    return variables, image, encode({name: {"encoder": tree} for name, tree in variables.items()}, image)


@pytest.mark.parametrize("decoder", [BaselineDecoder(5), ImprovedDecoder(5)], ids=["baseline", "improved"])
def test_pytorch_takes_the_tensors_strictly_and_gives_the_same_logits(tmp_path, monkeypatch, encoder, decoder):
    import safetensors.torch
    import torch

    from tests.peers import torch_twin

    encoded, image, features = encoder
    decoded = random_variables(decoder, features)
    variables = {name: {"encoder": tree} for name, tree in encoded.items()}
    for name, tree in decoded.items():
        variables[name]["decoder"] = tree
    model = Segmenter(ResNet("resnet18"), decoder)
    trained = inference.Trained(model, variables, Labels((), ()), (64, 96), META["settings"], {})
    monkeypatch.setattr(inference, "load_run", lambda *_, **__: trained)
    path = tmp_path / "model.safetensors"
    assert main(["run", "--output", str(path), "--format", "safetensors"]) == 0
    twin = torch_twin.Segmenter(5, improved=isinstance(decoder, ImprovedDecoder)).eval()
    twin.load_state_dict(safetensors.torch.load_file(path), strict=True)
    with torch.inference_mode():
        expected = twin(torch.from_numpy(image)).permute(0, 2, 3, 1).numpy()
    logits = jax.jit(decoder.apply)(decoded, features)[:, : image.shape[1], : image.shape[2]]
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max() and expected.std() > 0.01
    # The encoder can be taken out of it again, by --weights.
    for one, other in zip(jax.tree.leaves(load_encoder("resnet18", path)), jax.tree.leaves(encoded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    file = str(tmp_path / "model")
    cases = [
        (["--output", str(tmp_path)], "is a folder: name a file"),
        (["--output", str(tmp_path / "absent" / "model")], "there is no folder"),
        (["--output", file, "--format", "safetensors"], "must end in .safetensors"),
        (
            ["--output", f"{file}.safetensors", "--format", "safetensors", "--dtype", "float32"],
            "--dtype is for programs",
        ),
        (["--output", file, "--checkpoint", "first"], "--checkpoint first: use best, last or the number"),
        (["--output", file], "empty"),
    ]
    for options, message in cases:
        assert main([str(tmp_path / "empty"), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
