"""The PyTorch twin as a command: README compares its scores with ours."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxseg.train import Stage


def test_the_twin_trains_and_writes_its_scores(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    from tests.peers import torch_twin

    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 3), ("test", 1)):
        for part in ("img", "seg"):
            (tmp_path / "data" / split / part).mkdir(parents=True)
        for index in range(number):
            label = rng.integers(0, 2, (24, 40), dtype=np.uint8)
            Image.fromarray(np.repeat(label[..., None] * 100, 3, -1)).save(
                tmp_path / "data" / split / "img" / f"{index}.png"
            )
            Image.fromarray(label).save(tmp_path / "data" / split / "seg" / f"{index}.png")
    options = ["--dataset", f"folder:{tmp_path / 'data'}", "--num-classes", "2", "--weights", "none"]
    options += [
        "--image-size",
        "32",
        "32",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "1",
        "--workdir",
        str(tmp_path / "run"),
    ]
    assert torch_twin.main(options) == 0
    assert capsys.readouterr().out.count("epoch 1/1  loss") == 2
    results = json.loads((tmp_path / "torch-run" / "results.json").read_text())
    assert np.sum(results["val"]["confusion"]) == 3 * 24 * 40 and np.sum(results["test"]["confusion"]) == 24 * 40


def test_the_twin_weighs_the_classes():
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    from tests.peers import torch_twin

    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).T[None, :, None]
    model = torch.nn.Module()
    model.encoder, model.forward = torch.nn.Identity(), lambda image, frozen: logits
    batch = {"image": np.zeros((1, 1, 2, 3), np.uint8), "label": np.array([[[0, 1]]], np.uint8)}
    nothing = SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None)
    logits.requires_grad_()

    def loss(weights):
        stage = Stage("a stage", 1, 1e-3, True, class_weights=weights)
        return torch_twin.train_epoch(model, nothing, nothing, iter([batch]), 1, stage)

    # Of the first pixel the cross-entropy is log(1 + e), of the second log(1 + e^2).
    own = np.log(1 + np.exp([1, 2]))
    np.testing.assert_allclose(loss(None), own.mean(), rtol=1e-6)
    np.testing.assert_allclose(loss((1.0, 3.0)), (own[0] + 3 * own[1]) / 4, rtol=1e-6)
