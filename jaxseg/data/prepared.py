"""Any segmentation data set that TFDS has prepared on disk, in array_record files; needs no TensorFlow."""

import contextlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from jaxseg.data.labels import Labels, default_colours, name_classes

# The names of TFDS for our splits; the first that is there.
_SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}
_TFDS_MODULES = "tensorflow_datasets.core.features."


def find_prepared(data_dir: pathlib.Path, name: str) -> tfds.core.DatasetBuilder:
    """Finds a prepared data set.

    Args:
      data_dir: TFDS's folder, in which the data set has its own.
      name: as TFDS writes it, `name`, `name/config`, `name:1.0.0` or `name/config:1.0.0`; without a version the newest.

    Raises:
      ValueError: it is not there, or is not in a format that can be read.
    """
    folder = _find_version(data_dir.expanduser(), name)
    _check_features(folder)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # protobuf has errors of its own
        reason = (str(error).splitlines() or [repr(error)])[-1]
        raise ValueError(f"{folder}: is damaged ({reason}); prepare the data set again") from error
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"{folder} is prepared as {' and '.join(formats)}, which cannot be read without TensorFlow. Where that is"
            " installed, with tensorflow-datasets and apache-beam: python -m tensorflow_datasets.scripts.convert_format"
            f" --dataset_version_dir={folder} --out_file_format=array_record"
        )
    return builder


def name_labels(
    builder: tfds.core.DatasetBuilder, image_key: str, label_key: str, offset: int, num_classes: int | None
) -> Labels:
    """The classes of a data set, which its label's feature may know.

    Args:
      builder: of the data set.
      image_key: the feature with the image.
      label_key: the feature with the label.
      offset: what is added to the label's values; the classes before it have no number left.
      num_classes: as the user has it, or None.

    Raises:
      ValueError: there are no such features, or the number of classes is not known or another one.
    """
    features = builder.info.features
    for option, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key not in features:
            raise ValueError(f"{builder.data_dir}: no feature {key!r}; give {option}, one of {', '.join(features)}")
    feature = features[label_key]
    known = getattr(feature, "num_classes", None)
    if known is None:
        if num_classes is None:
            raise ValueError(f"{builder.data_dir}: does not say how many classes {label_key!r} has; give --num-classes")
        return name_classes(num_classes)
    known += offset
    if num_classes is not None and num_classes != known:
        raise ValueError(
            f"{builder.data_dir}: {label_key!r} has {known} classes with --label-offset {offset}, but --num-classes is"
            f" {num_classes}: leave --num-classes out"
        )
    names = tuple(feature.names or ())[max(0, -offset) :]
    return Labels(names, default_colours(known)) if len(names) == known else name_classes(known)


def name_splits(builder: tfds.core.DatasetBuilder, given: Sequence[str] | None) -> dict[str, str]:
    """What train, val and test, if there is one, are called in a data set.

    Args:
      builder: of the data set.
      given: two or three splits or slices such as 'train[:90%]', or None for those of the usual names.

    Raises:
      ValueError: there is no split for training or validation.
    """
    if given is not None:
        return dict(zip(_SPLITS, given, strict=False))
    there = builder.info.splits
    named = {ours: next((name for name in names if name in there), None) for ours, names in _SPLITS.items()}
    for ours in ("train", "val"):
        if named[ours] is None:
            raise ValueError(
                f"{builder.data_dir}: no split {' or '.join(_SPLITS[ours])}, only {', '.join(there)}; name what to use"
                " with --splits, such as --splits 'train[:90%]' 'train[90%:]' test"
            )
    return {ours: name for ours, name in named.items() if name is not None}


def _find_version(data_dir: pathlib.Path, name: str) -> pathlib.Path:
    match = re.fullmatch(r"(\w+)(?:/([^:/]+))?(?::(\d+\.\d+\.\d+))?", name)
    if match is None:
        raise ValueError(f"--dataset tfds:{name}: write tfds:NAME, or NAME/CONFIG, with or without :VERSION")
    name, config, version = match.groups()
    folder = data_dir / name / (config or "")
    versions = {path.parent.name: path.parent for path in folder.glob("*/dataset_info.json")}
    if not versions and config is None:
        configs = sorted({path.parent.parent.name for path in folder.glob("*/*/dataset_info.json")})
        if len(configs) == 1:
            return _find_version(data_dir, f"{name}/{configs[0]}" + (f":{version}" if version else ""))
        if configs:
            raise ValueError(f"{folder}: has several configurations: give tfds:{name}/CONFIG, of {', '.join(configs)}")
    if not versions or version not in (None, *versions):
        there = f"only {', '.join(sorted(versions))}" if versions else "nothing"
        raise ValueError(
            f"{folder}: {there} prepared there; give TFDS's folder with --data-dir, or prepare it where TensorFlow is"
            """ installed: python -c "import tensorflow_datasets as tfds;"""
            f""" tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""""
        )
    return versions[version] if version else max(versions.values(), key=lambda path: _number(path.name))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _check_features(folder: pathlib.Path) -> None:
    """Raises ValueError unless all features are TFDS's own: it imports whatever module features.json names."""
    path = folder / "features.json"
    try:
        stack = [json.loads(path.read_text())]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); prepare the data set again") from error
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                named = key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str)
                if named and not inner.startswith(_TFDS_MODULES):
                    raise ValueError(f"{path}: has a feature {inner}, which is not of TFDS; such data are not read")
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, str):  # a feature may be written as JSON within the JSON
            with contextlib.suppress(ValueError):
                stack.append(json.loads(value))
