"""Data sets that TFDS has prepared: found, read without TensorFlow, or refused in one line."""

import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.datasets import DataOptions, find_data

MODE = {"label": "png"}


class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Features as Oxford-IIIT Pet has them, and labels of other kinds."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "raw_image": tfds.features.Tensor(shape=(5, 7, 3), dtype=np.uint8),
            "species": tfds.features.ClassLabel(names=["cat", "dog"]),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1), use_colormap=True),
            "named": tfds.features.LabeledImage(labels=["none", "pet", "edge"], shape=(None, None, 1)),
            "array": tfds.features.Tensor(shape=(None, None, 1), dtype=np.int32, encoding="zlib"),
            "heat": tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="zlib"),
            "mask": tfds.features.Tensor(shape=(None, None), dtype=np.bool_, encoding="zlib"),
            "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature()}),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, _):
        return {"train": self._generate_examples("train", 10), "test": self._generate_examples("test", 2)}

    def _generate_examples(self, split, count):
        for index in range(count):
            yield (
                index,
                {
                    "image": png(image(split, index)),
                    "raw_image": image(split, index)[:5, :7],
                    "species": index % 2,
                    "segmentation_mask": png(label(split, index)),
                    "named": png(label(split, index) % 3),
                    "array": label(split, index)[..., None].astype(np.int32),
                    "heat": np.zeros((5 + index, 7), np.float32),
                    "mask": label(split, index) > 1,
                    "boxes": {"box": []},
                },
            )


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file


def image(split, index):
    return np.random.default_rng([len(split), index]).integers(0, 256, (5 + index, 7, 3), np.uint8)


def label(split, index):
    """Trimaps: 1 pet, 2 background, 3 edge; in one example an ignored pixel."""
    values = np.random.default_rng([len(split), index]).integers(1, 4, (5 + index, 7), np.uint8)
    if index == 1:
        values[0, 0] = 255
    return values


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("tfds")
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        Pets.VERSION = tfds.core.Version(version)
        Pets(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def options(data_dir, name="pets", **more):
    more = {"label_key": "segmentation_mask", "label_offset": -1, "num_classes": 3, **more}
    more = {"splits": ("train[:70%]", "train[70%:]", "test"), **more}
    return DataOptions(f"tfds:{name}", data_dir=data_dir, **more)


def test_pets_are_read(data_dir):
    labels, open_splits = find_data(options(data_dir))
    splits = open_splits()
    assert labels.names == ("class 0", "class 1", "class 2")
    assert {split: len(source) for split, source in splits.items()} == {"train": 7, "val": 3, "test": 2}
    for split, source, first in (("train", "train", 0), ("val", "train", 7), ("test", "test", 0)):
        for k in range(len(splits[split])):
            item, trimap = splits[split][k], label(source, first + k)
            assert item["image"].dtype == item["label"].dtype == np.uint8
            np.testing.assert_array_equal(item["image"], image(source, first + k))
            np.testing.assert_array_equal(item["label"], np.where(trimap == 255, 255, trimap - 1.0))
            np.testing.assert_array_equal(splits[split].label(k), item["label"])
            assert splits[split].label_sizes()[k].tolist() == list(trimap.shape)
            assert item["name"] == str(k)


@pytest.mark.parametrize("more", [{"label_key": "array"}, {"label_key": "array", "image_key": "raw_image"}])
def test_arrays_are_read_as_files_are(data_dir, more):
    if "image_key" in more:
        more["splits"] = ("train[:1]", "test[:1]")
    splits = find_data(options(data_dir, **more))[1]()
    item, trimap = splits["train"][0], label("train", 0)
    np.testing.assert_array_equal(item["label"], trimap - 1)
    np.testing.assert_array_equal(item["image"], image("train", 0))
    assert splits["train"].label_sizes()[0].tolist() == [5, 7]


def test_a_mask_of_truth_values_is_class_0_and_1(data_dir):
    _, open_splits = find_data(options(data_dir, label_key="mask", label_offset=0))
    np.testing.assert_array_equal(open_splits()["train"].label(0), label("train", 0) > 1)


def test_the_newest_version_is_read_unless_one_is_named(data_dir):
    from jaxseg.data.prepared import find_prepared

    assert str(find_prepared(data_dir, "pets").version) == "1.10.0"
    assert str(find_prepared(data_dir, "pets:1.9.0").version) == "1.9.0"


def test_a_feature_may_know_its_classes(data_dir):
    known = {"label_key": "named", "num_classes": None, "label_offset": 0}
    labels, open_splits = find_data(options(data_dir, **known))
    assert labels.names == ("none", "pet", "edge")
    np.testing.assert_array_equal(open_splits()["test"].label(0), label("test", 0) % 3)
    known |= {"label_offset": -1, "label_ignore": (255, 0)}
    labels, open_splits = find_data(options(data_dir, **known))
    assert labels.names == ("pet", "edge")
    remainder = label("test", 0) % 3
    np.testing.assert_array_equal(open_splits()["test"].label(0), np.where(remainder == 0, 255, remainder - 1.0))


def refusal(given) -> str:
    with pytest.raises(ValueError) as error:
        find_data(given)[1]()
    assert "\n" not in str(error.value)
    return str(error.value)


MISTAKES = {
    "no data set": ({"name": "cats"}, r"cats: nothing prepared there; give TFDS's folder with --data-dir, or prepare"),
    "no version": ({"name": "pets:2.0.0"}, "only 1.0.0, 1.10.0, 1.9.0 prepared there"),
    "no config": ({"name": "pets/small"}, "small: nothing prepared there"),
    "outside": ({"name": "../pets"}, "--dataset tfds:../pets: write tfds:NAME"),
    "image key": ({"image_key": "picture"}, "no feature 'picture'; give --image-key, one of"),
    "label key": ({"label_key": "label"}, "no feature 'label'; give --label-key, one of"),
    "no number": ({"num_classes": None}, "does not say how many classes 'segmentation_mask' has; give --num-classes"),
    "other number": ({"label_key": "named"}, "'named' has 2 classes with --label-offset -1, but --num-classes is 3"),
    "no val": ({"splits": None}, "no split validation or val, only train, test; name what to use with --splits"),
    "no split": ({"splits": ("train", "dev")}, "split 'dev' cannot be read (Unknown split 'dev'. Should be one of"),
    "empty": ({"splits": ("train", "test[:0]")}, "split 'test[:0]' cannot be read"),
    "no offset": ({"label_offset": 0}, "train[:70%][0]: has the value 3, outside 0..2"),
    "offset": ({"label_offset": -2}, "its label has the value 1, which --label-offset -2 makes -1"),
    "label of colours": (
        {"label_key": "raw_image"},
        "train[:70%][0]: its label is uint8 of shape (5, 7, 3), not whole",
    ),
    "label of fractions": ({"label_key": "heat"}, "its label is float32 of shape (5, 7), not whole numbers"),
    "image of one channel": ({"image_key": "array"}, "its image is int32 of shape (5, 7, 1), not uint8 of (H, W, 3)"),
    "large": ({"label_offset": 254}, "its label has the value 1, which --label-offset 254 makes 255"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(data_dir, case):
    more, said = MISTAKES[case]
    assert said in refusal(options(data_dir, **more))


def copy_of(data_dir, root) -> pathlib.Path:
    (root / "pets" / "1.0.0").mkdir(parents=True)
    for path in (data_dir / "pets" / "1.0.0").iterdir():
        (root / "pets" / "1.0.0" / path.name).write_bytes(path.read_bytes())
    return root / "pets" / "1.0.0"


def test_what_is_prepared_as_tfrecord_is_answered_with_the_command_that_converts_it(data_dir, tmp_path):
    folder = copy_of(data_dir, tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    said = refusal(options(tmp_path))
    assert "is prepared as tfrecord, which cannot be read without TensorFlow" in said
    assert f"convert_format --dataset_version_dir={folder} --out_file_format=array_record" in said
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (folder / "dataset_info.json").write_text(json.dumps(info))  # as the command leaves it
    assert len(find_data(options(tmp_path))[1]()["train"]) == 7


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(content) // 2, 2000):
        content[place] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "cut": ("pets-train.array_record-00000-of-00001", lambda path: path.write_bytes(path.read_bytes()[:5000])),
    "missing": ("pets-train.array_record-00000-of-00001", pathlib.Path.unlink),
    "flipped": ("pets-train.array_record-00000-of-00001", flip),
    "no features": ("features.json", pathlib.Path.unlink),
    "other features": ("features.json", lambda path: path.write_text("{}")),
    "features in features": ("features.json", lambda path: path.write_text(100_000 * "[")),
    "information": ("dataset_info.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_data_set_is_named(data_dir, tmp_path, case):
    name, damage = DAMAGES[case]
    folder = copy_of(data_dir, tmp_path)
    damage(folder / name)
    assert str(folder) in refusal(options(tmp_path))


def as_usual(features: dict) -> dict:
    features["featuresDict"]["features"]["array"]["pythonClassName"] = "evil.Tensor"
    return features


def by_the_other_name(features: dict) -> dict:
    """Protobuf takes the fields' own names, too."""
    feature = features["featuresDict"]["features"]["array"]
    feature["python_class_name"] = feature.pop("pythonClassName").replace("tensorflow_datasets", "evil")
    return features


def within_a_string(features: dict) -> dict:
    inner = {"feature": {"type": "evil.Tensor", "content": {}}, "length": None}
    name = "tensorflow_datasets.core.features.sequence_feature.Sequence"
    features["featuresDict"]["features"]["array"] = {
        "pythonClassName": name,
        "jsonFeature": {"json": json.dumps(inner)},
    }
    return features


@pytest.mark.parametrize("change", [as_usual, by_the_other_name, within_a_string])
def test_no_module_is_imported_because_a_file_names_it(data_dir, tmp_path, change):
    folder = copy_of(data_dir, tmp_path)
    features = json.loads((folder / "features.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    (folder / "features.json").write_text(json.dumps(change(features)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert "which is not of TFDS" in refusal(options(tmp_path))


def test_a_configuration_must_be_named_where_there_are_several(data_dir, tmp_path):
    for config in ("large", "small"):
        (tmp_path / "pets" / config / "1.0.0").mkdir(parents=True)
        for path in (data_dir / "pets" / "1.0.0").iterdir():
            (tmp_path / "pets" / config / "1.0.0" / path.name).write_bytes(path.read_bytes())
        if config == "large":
            assert len(find_data(options(tmp_path))[1]()["train"]) == 7
    assert "give tfds:pets/CONFIG, of large, small" in refusal(options(tmp_path))
    assert len(find_data(options(tmp_path, "pets/small:1.0.0"))[1]()["train"]) == 7
