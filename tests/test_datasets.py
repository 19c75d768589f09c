"""From the name of a data set, as every command takes it, to its examples."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.datasets import KINDS, DataOptions, find_data, options_of, same_data, short_name
from experiments.settings import RECIPES, Options, complete, to_json
from jaxseg.data import shapes
from jaxseg.data.labels import CAMVID, VOC9
from tests.peers import small_voc


def test_every_kind_has_a_recipe_for_every_experiment():
    usual = {(name, kind) for name in ("baseline", "improved") for kind in KINDS}
    assert set(RECIPES) == usual | {("ablation", "camvid")}


@pytest.fixture
def folder(tmp_path):
    for split, values in (("train", (0, 1)), ("val", (1, 1))):
        for part in ("img", "seg"):
            (tmp_path / split / part).mkdir(parents=True)
        Image.new("RGB", (2, 1)).save(tmp_path / split / "img" / "a.png")
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / split / "seg" / "a.png")
    return tmp_path


def test_one_split_can_be_opened_without_looking_at_the_others(folder):
    (folder / "train" / "img" / "a.png").write_bytes(b"bad")
    labels, open_splits = find_data(DataOptions(f"folder:{folder}", 2), ("val",))
    assert labels.num_classes == 2
    assert {name: len(source) for name, source in open_splits().items()} == {"val": 1}
    with pytest.raises(ValueError, match=r"train/img/a\.png"):
        find_data(DataOptions(f"folder:{folder}", 2))[1]()


def test_shapes_are_rendered_only_when_the_splits_are_opened(tmp_path, monkeypatch):
    config = shapes.ShapesConfig(counts=(2, 1, 1), height=32, width=32)
    open_shapes = shapes.open_shapes
    monkeypatch.setattr(shapes, "open_shapes", lambda data_dir, _: open_shapes(data_dir, config))
    labels, open_splits = find_data(DataOptions(data_dir=tmp_path / "data"), ("test", "val"))
    assert labels.names == shapes.NAMES and not (tmp_path / "data").exists()
    assert {name: len(source) for name, source in open_splits().items()} == {"test": 1, "val": 1}


def test_small_shapes_are_other_and_fewer_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SMALL", shapes.ShapesConfig(counts=(3, 1, 1), height=32, width=64))
    labels, open_splits = find_data(DataOptions("shapes:small", data_dir=tmp_path))
    splits = open_splits()
    assert labels.names == shapes.NAMES and {name: len(source) for name, source in splits.items()} == {
        "train": 3, "val": 1, "test": 1,
    }  # fmt: skip
    assert splits["train"][0]["image"].shape == (32, 64, 3)
    assert short_name("shapes:small") == "shapes-small"


def test_voc9_and_camvid_are_made_from_the_manual_folder(tmp_path):
    small_voc.write(tmp_path / "manual")
    labels, open_splits = find_data(DataOptions("voc9", manual_dir=tmp_path / "manual", data_dir=tmp_path / "data"))
    assert labels is VOC9 and not (tmp_path / "data").exists()
    assert {name: len(source) for name, source in open_splits().items()} == {"train": 3, "val": 3, "test": 2}
    for split in ("train", "val"):
        for part in ("img", "seg"):
            (tmp_path / "streets" / split / part).mkdir(parents=True)
            Image.new("RGB" if part == "img" else "L", (2, 1)).save(tmp_path / "streets" / split / part / "a.png")
    options = DataOptions("camvid", manual_dir=tmp_path / "streets", data_dir=tmp_path / "data")
    labels, open_splits = find_data(options)
    assert labels is CAMVID and {name: len(source) for name, source in open_splits().items()} == {"train": 1, "val": 1}
    with pytest.raises(ValueError, match="the data set has no test split, only train, val"):
        find_data(options, ("test",))[1]()


def test_a_runs_data_is_found_again_by_its_settings(folder, monkeypatch):
    options = DataOptions(f"folder:{folder}", 2, folder / "elsewhere")
    settings = Options(**vars(options), weights="none", workdir=folder)
    assert options_of(json.loads(json.dumps(to_json(complete(settings, "baseline"))))) == options
    monkeypatch.chdir(folder.parent)
    again = DataOptions(f"folder:{folder.name}/", 2)
    assert again != options and same_data(again) == same_data(options)
    assert same_data(DataOptions("shapes")) != same_data(DataOptions("shapes:small"))


def test_options_that_do_not_fit_are_refused_before_any_file_is_looked_at(tmp_path):
    for options, said in (
        (DataOptions(f"{tmp_path}"), f"use shapes, folder:{tmp_path}, voc9, camvid or tfds:NAME"),
        (DataOptions("shapes:large"), "unknown --dataset 'shapes:large'"),
        (DataOptions("folder:"), "use shapes, folder:DIR, voc9"),
        (DataOptions("shapes", 3), "--num-classes is for folders and tfds: shapes has"),
        (DataOptions("folder:nowhere", 1), "--num-classes must be from 2 to 255, not 1"),
        (DataOptions("voc9:x"), "unknown --dataset 'voc9:x'"),
        (DataOptions("tfds"), "unknown --dataset 'tfds'"),
        (DataOptions("shapes:"), "unknown --dataset 'shapes:'"),
        (DataOptions("folder:x", manual_dir=tmp_path), "--manual-dir is for voc9 and camvid, not for folder"),
        (DataOptions("tfds:x", skip_bad=True), "--skip-bad is for voc9 and camvid, not for tfds"),
        (DataOptions("voc9", label_offset=-1), "--label-offset is for tfds:NAME, not for voc9"),
        (DataOptions("tfds:x", splits=("train",)), "--splits: give two or three"),
        (DataOptions("tfds:x", label_offset=256), "--label-offset must be from -255 to 255"),
        (DataOptions("tfds:x", label_ignore=(0, 256)), "--label-ignore must be from 0 to 255"),
    ):
        with pytest.raises(ValueError, match=said):
            find_data(options)


def test_results_are_called_after_the_data_set(folder):
    assert short_name("shapes") == "shapes" and short_name(f"folder:{folder}/") == folder.name
    assert short_name("tfds:pets:1.0.0") == "pets-1.0.0" and short_name("tfds:pets/small") == "pets-small"
