"""Two runs side by side: what is counted, which images are shown, and what is said of runs that do not fit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from experiments import compare
from jaxseg import inference, metrics
from jaxseg.data.labels import Labels

# The brightness of class 0 and of class 1.
DARK, BRIGHT = (20, 80), (120, 180)


class Threshold(nn.Module):
    """Class 1 where an image is brighter than `level`."""

    level: float

    def __call__(self, image, size=None):
        grey = image.astype(jnp.float32).mean(-1)
        return jnp.stack([self.level - grey, grey - self.level], -1)


def make_trained(level, dataset, names=("low", "high")):
    settings = {"dataset": dataset, "num_classes": None, "data_dir": "data", "eval_size": "fixed", "batch_size": 4}
    about = {"stage_name": "stage 2: everything", "epoch": 3, "score": 0.5}
    labels = Labels(names, ((0, 0, 0), (255, 0, 0)))
    return inference.Trained(Threshold(level), {}, labels, (32, 32), settings, about)


@pytest.fixture
def folder(tmp_path):
    """Images for which 50 is the right level, then some for which it is 150, of less and less class 0."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for part in ("img", "seg"):
        for split in ("train", "val"):
            (root / split / part).mkdir(parents=True)
    for index in range(6):
        label = (rng.random((32, 32)) > (0.9 - 0.1 * index)).astype(np.uint8)
        values = np.array(DARK if index < 3 else BRIGHT)
        image = np.repeat(values[label][..., None], 3, -1).astype(np.uint8)
        label[rng.random((32, 32)) < 0.1] = 255
        for split in ("train", "val"):
            Image.fromarray(image).save(root / split / "img" / f"{index}.png")
            Image.fromarray(label).save(root / split / "seg" / f"{index}.png")
    (root / "classes.txt").write_text("low\nhigh\n")
    return root


@pytest.fixture
def runs(tmp_path, folder, monkeypatch):
    """Two runs on the folder, by their workdirs' names; others may be added."""
    found = {"one": make_trained(50.0, f"folder:{folder}"), "two": make_trained(150.0, f"folder:{folder}/.")}
    monkeypatch.setattr(inference, "load_run", lambda path, *_: found[path.name])
    return found


def read(folder, index):
    return (np.array(Image.open(folder / "val" / part / f"{index}.png")) for part in ("img", "seg"))


def test_two_runs_are_compared_image_by_image(tmp_path, folder, runs, capsys):
    output = tmp_path / "compared"
    argv = [str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(output), "--images", "2"]
    output.mkdir()
    (output / "b_better_9.png").write_text("of an earlier comparison")
    assert compare.main(argv) == 2
    assert "is not empty and holds no comparison" in capsys.readouterr().err
    (output / "comparison.md").write_text("of an earlier comparison")
    assert compare.main(argv) == 0
    record = json.loads((output / "comparison.json").read_text())
    for letter, level in (("A", 50), ("B", 150)):
        total = np.zeros((2, 2), np.int64)
        for index in range(6):
            image, label = read(folder, index)
            confusion = metrics.confusion_matrix(label, (image[..., 0] > level).astype(np.int32), 2)
            assert record[letter]["images"][str(index)] == pytest.approx(metrics.mean_iou(np.asarray(confusion)))
            total += np.asarray(confusion)
        assert record[letter]["mean_iou"] == pytest.approx(metrics.mean_iou(total))
        np.testing.assert_allclose(list(record[letter]["iou"].values()), metrics.iou_per_class(total))
    out = capsys.readouterr().out
    assert "A has the higher mean IoU on 3 of 6 images" in out and "B has the higher mean IoU on 3 of 6" in out
    table = (output / "comparison.md").read_text()
    assert table in out and "| class    |  A: one |  B: two | difference |" in table
    difference = record["B"]["mean_iou"] - record["A"]["mean_iou"]
    assert f"{difference:+z.5f} |" in table
    assert {path.name for path in output.iterdir()} == {
        "comparison.md", "comparison.json", "classes.png", "a_better_1.png", "b_better_1.png",
    }  # fmt: skip
    assert set(record["figures"]) == {path.name for path in output.glob("*.png")}


@pytest.mark.parametrize("number", [1, 3, 50])
def test_the_images_are_those_with_the_largest_differences_each_way(number):
    rng = np.random.default_rng(number)
    for size in (0, 1, 7, 40):
        scores = rng.integers(0, 10, (2, size)) / 10
        gains = scores[1] - scores[0]
        for sign, chosen in zip((-1, 1), compare.choose_images(scores, number), strict=True):
            assert len(set(chosen)) == len(chosen) == min(number, int((sign * gains > 0).sum()))
            assert sorted(sign * gains[chosen], reverse=True) == (sign * gains[chosen]).tolist()
            left = sign * np.delete(gains, chosen)
            if chosen and len(left):
                assert left.max() <= (sign * gains[chosen]).min()


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path, folder, runs, capsys, monkeypatch):
    runs["elsewhere"] = make_trained(50.0, f"folder:{tmp_path}")
    runs["renamed"] = make_trained(50.0, f"folder:{folder}", ("low", "higher"))
    (tmp_path / "file").write_text("")

    def fails(*argv):
        assert compare.main([str(tmp_path / name) if "-" not in name else name for name in argv]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert f"folder:{tmp_path}: name runs on the same data" in fails("one", "elsewhere")
    assert "the runs' classes differ: low, high in" in fails("one", "renamed")
    assert "--output" in fails("one", "two", "--output", "file") and not (tmp_path / "compared").exists()
    assert "test" in fails("one", "two", "--split=test")
    assert "--images must be above 0" in fails("one", "two", "--images=0")
    # The data has classes of its own now.
    (folder / "classes.txt").write_text("small\nlarge\n")
    assert "has other classes now than the runs: small, large" in fails("one", "two")
    (folder / "classes.txt").write_text("low\nhigh\n")
    (folder / "val" / "img" / "3.png").write_text("")
    assert "3.png" in fails("one", "two")
    monkeypatch.undo()
    assert "no such folder" in fails("nowhere", "two")
