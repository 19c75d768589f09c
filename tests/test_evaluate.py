"""`experiments.evaluate`: a run's own numbers to the pixel, and the same from class maps that another program made."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, predict
from experiments import prepare as preparing
from jaxseg import boundary, inference, metrics
from tests.peers import small_run
from tests.test_boundary import expected_counts

SIZES = [(64, 40), (33, 70), (32, 32), (20, 20), (40, 64)]
DEVICES = jax.local_devices()[:1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of mixed sizes, and a run on it: (its folder, the workdir)."""
    root = tmp_path_factory.mktemp("evaluate")
    data = small_run.write_folder(
        root / "data",
        {"train": 4, "val": 3, "test": 5},
        shape=lambda index: SIZES[index % len(SIZES)],
        ignored=lambda index: 1.0 if index == 3 else 0.1,
    )
    (data / "classes.txt").write_text("dark\nbright\n")
    argv = ["--dataset", f"folder:{data}", "--weights", "none", "--image-size", "32", "64", "--batch-size", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "ResNet", small_run.SmallEncoder)
        patch.setattr("jaxseg.train.all_devices", lambda: DEVICES)
        patch.setattr("experiments.run.draw", lambda *_: None)
        options = ["--epochs", "0", "1", "--workdir", str(root / "run")]
        assert small_run.main([*argv, *options]) == 0
    return data, root / "run"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One strided convolution in the ResNet's place, one device."""
    monkeypatch.setattr(inference, "ResNet", small_run.SmallEncoder)
    monkeypatch.setattr(jax, "local_devices", lambda: DEVICES)


def scores_of(folder, split="test"):
    return json.loads((folder / "evaluation.json").read_text())[split]


def test_a_run_and_its_class_maps_give_the_runs_own_numbers(trained, tmp_path, capsys):
    data, run = trained
    own = json.loads((run / "results.json").read_text())
    for split in ("val", "test"):
        assert evaluate.main([str(run), "--split", split, "--worst", "0"]) == 0
        assert scores_of(run / f"evaluation-data-{split}", split) == own[split]
    assert evaluate.main([str(run / "checkpoints"), "--worst", "0"]) == 0
    maps = tmp_path / "maps"
    assert predict.main([str(run), str(data / "test" / "img"), "--output", str(maps), "--batch-size", "3"]) == 0
    # What is no class map is in nobody's way, and what belongs to no image is told of.
    (maps / "notes.txt").write_text("")
    Image.new("L", (3, 3)).save(maps / "other.png")
    capsys.readouterr()
    argv = [str(maps), "--dataset", f"folder:{data}", "--worst", "2"]
    assert evaluate.main([*argv, "--output", str(tmp_path / "scored")]) == 0
    assert scores_of(tmp_path / "scored") == own["test"]
    out, err = capsys.readouterr()
    assert metrics.iou_table(np.array(own["test"]["confusion"]), ("dark", "bright"))[-20:] in out
    assert "1 class map is of no image: other.png" in err
    found = {path.name for path in (tmp_path / "scored").iterdir()}
    assert found == {"evaluation.json", "images.csv", "confusion.png", "worst_1.png"}
    assert {path.name for path in maps.iterdir()} == {*(f"{index}.png" for index in range(5)), "notes.txt", "other.png"}


def test_images_are_listed_from_the_worst_and_boundary_iou_is_counted_over_all(trained, tmp_path, capsys):
    data, _ = trained
    rng, maps = np.random.default_rng(1), tmp_path / "maps"
    maps.mkdir()
    expected, boundaries = {}, np.zeros((2, 2))
    for path in sorted((data / "test" / "seg").iterdir()):
        label = np.asarray(Image.open(path))
        classes = np.where(rng.random(label.shape) < 0.2 * int(path.stem), 1 - label % 2, label % 2).astype(np.uint8)
        # Where the label says nothing, a class map may say anything.
        classes[label == 255] = 255
        Image.fromarray(classes).save(maps / path.name)
        iou = metrics.iou_per_class(metrics.confusion_on_host(label, classes, 2))
        expected[path.stem] = np.nan if np.isnan(iou).all() else np.nanmean(iou)
        width = boundary.boundary_width(np.array(label.shape))
        boundaries += expected_counts(label, classes, label.shape, width, 2)[1]
    assert evaluate.main([str(maps), "--dataset", f"folder:{data}", "--worst", "3", "--boundary-iou"]) == 0
    found = scores_of(maps / "evaluation-data-test")["boundary_iou"]
    assert list(found.values()) == pytest.approx(boundaries[0] / boundaries[1])
    with open(maps / "evaluation-data-test" / "images.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "mean_iou", "dark", "bright"]
    # The image that is ignored altogether has no score, and comes last.
    assert [row[0] for row in rows[1:]] == ["4", "2", "1", "0", "3"] and rows[-1] == ["3", "", "", ""]
    for name, mean, *_ in rows[1:-1]:
        assert float(mean) == pytest.approx(expected[name], abs=1e-6)
    out = capsys.readouterr().out
    assert "the worst of 5 images" in out and out.index(f"{expected['4']:.4f}  4") < out.index(
        f"{expected['1']:.4f}  1"
    )
    assert (maps / "evaluation-data-test" / "worst_1.png").exists()


def test_class_maps_that_do_not_fit_are_named_and_nothing_is_scored(trained, tmp_path, capsys):
    data, _ = trained
    for path in (data / "test" / "seg").iterdir():
        classes = np.asarray(Image.open(path)) % 2
        changed = {"0": None, "1": classes[:-1], "2": classes + 2}.get(path.stem, classes)
        if changed is not None:
            Image.fromarray(changed).save(tmp_path / path.name)
    (tmp_path / "4.png").write_bytes(b"no PNG")
    assert evaluate.main([str(tmp_path), "--dataset", f"folder:{data}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ("1 of 5 missing: 0.png", "1.png is 70x32", "its image 70x33", "2.png has the value 3", "4.png: "):
        assert part in line, line
    assert line.endswith("nothing was scored") and not (tmp_path / "evaluation-data-test").exists()


def test_a_mistake_is_one_line(trained, tmp_path, capsys):
    data, run = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0.png").write_text("")
    (tmp_path / "three").mkdir()
    small_run.write_folder(tmp_path / "three", {"test": 1})
    (tmp_path / "three" / "classes.txt").write_text("dark\nbright\nother\n")
    cases = [
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "neither the workdir of a run nor a folder with PNG class maps"),
        ([tmp_path / "full"], "give the --dataset"),
        ([run, "--dataset", "other"], "unknown --dataset"),
        ([run, "--dataset", f"folder:{tmp_path}"], "classes.txt: no such file"),
        ([run, "--dataset", f"folder:{tmp_path / 'three'}"], "has 3 classes, but"),
        ([run, "--output", tmp_path / "full"], "is not empty and holds no evaluation"),
        ([run, "--output", run], "is not empty and holds no evaluation"),
        ([run, "--output", data / "classes.txt"], "is a file: name a folder"),
        ([run, "--worst", "-1"], "--worst must be 0 or more"),
    ]
    for arguments, message in cases:
        assert evaluate.main(list(map(str, arguments))) == 2, message
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], (message, lines)


def test_classes_of_other_names_are_told_of_and_another_dtype_is_used(trained, tmp_path, capsys):
    run = trained[1]
    other = small_run.write_folder(tmp_path / "other", {"test": 2})
    (other / "classes.txt").write_text("dark\nlight\n")
    argv = [str(run), "--dataset", f"folder:{other}", "--dtype", "bfloat16", "--size", "native", "--worst", "0"]
    assert evaluate.main([*argv, "--output", str(tmp_path / "scored")]) == 0
    assert "class 1 is light in" in capsys.readouterr().err
    about = json.loads((tmp_path / "scored" / "evaluation.json").read_text())
    assert about["dtype"] == "bfloat16" and about["image_size"] is None and about["images"] == 2
