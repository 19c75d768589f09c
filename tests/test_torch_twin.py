"""The PyTorch twin as a command: README compares its scores with ours."""

import json

import numpy as np
import pytest
from PIL import Image


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
    options += ["--class-weights", "sqrt"]
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
