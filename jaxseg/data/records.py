"""TFDS data sets of images and labels in array_record files, which need no TensorFlow: written, and read.

A data set appears under its final name only once it is complete: what a process that was killed left is removed by the
next one. Of several processes one prepares and the others wait.
"""

import contextlib
import io
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from jaxseg.data.images import UnreadableFileError, label_size, read_image, read_label
from jaxseg.data.labels import IGNORE_LABEL
from jaxseg.files import locked


class RecordSource:
    """Random access to one split, or a slice of one; threads may read it at the same time.

    Args:
      builder: of a data set that is prepared, in array_record files.
      split: such as 'train' or 'train[:90%]'.
      image_key: the feature with the image.
      label_key: the feature with the label, (H, W) or (H, W, 1).
      offset: what is added to the label's values.
      ignored: values that become 255, before the offset.

    Raises:
      ValueError: there is no such split or it is empty, or there are no such features.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        *,
        image_key: str = "image",
        label_key: str = "label",
        offset: int = 0,
        ignored: Sequence[int] = (IGNORE_LABEL,),
    ):
        features = dict(builder.info.features)
        # The example's other features are not even parsed, and these two are decoded by the rules that hold for files.
        named = {"name": features["name"]} if isinstance(features.get("name"), tfds.features.Text) else {}
        keys = {"image": image_key, "label": label_key}
        self._features = tfds.features.FeaturesDict({key: features[key] for key in keys.values()} | named)
        self._keys, self._where = keys, f"{builder.data_dir}, {split}"
        self._offset, self._table = offset, _shift_table(offset, ignored)
        try:
            self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{builder.data_dir}: split {split!r} cannot be read ({_reason(error)})") from error

    def __len__(self) -> int:
        """The number of examples."""
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        """Decodes one example.

        Returns:
          {"image": (H, W, 3) uint8 RGB, "label": (H, W) uint8, "name": of the example, or its number}.

        Raises:
          IndexError: `index` is not in [-len, len).
          ValueError: the image or the label cannot be read, or has impossible values.
        """
        record, where = self._parse(index)
        image = record[self._keys["image"]]
        if isinstance(image, bytes):
            image = read_image(io.BytesIO(image), where)
        else:
            image = np.asarray(self._features[self._keys["image"]].decode_example_np(image))
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(
                    f"{where}: its image is {image.dtype} of shape {image.shape}, not uint8 of (H, W, 3); give another"
                    " --image-key"
                )
        name = record["name"].decode() if "name" in record else str(index)
        return {"image": image, "label": self._decode_label(record, where), "name": name}

    def label(self, index: int) -> np.ndarray:
        """Decodes one label alone: (H, W) uint8."""
        return self._decode_label(*self._parse(index))

    def label_sizes(self) -> np.ndarray:
        """(N, 2) int64: the height and width of each label in pixels."""
        sizes = np.empty((len(self), 2), np.int64)
        for index in range(len(self)):
            record, where = self._parse(index)
            label = record[self._keys["label"]]
            if isinstance(label, bytes):
                sizes[index] = label_size(io.BytesIO(label), where)
            else:
                sizes[index] = self._decode_label(record, where).shape
        return sizes

    def where(self, index: int) -> tuple[str, str]:
        """What messages call an example's image and its label."""
        return (f"{self._where}[{index}]",) * 2

    def _parse(self, index: int) -> tuple[dict, str]:
        """The encoded features of an example, and what messages call it."""
        index = range(len(self))[index]
        where, skip = self.where(index)[0], dict.fromkeys(self._features, tfds.decode.SkipDecoding())
        try:
            return self._features.deserialize_example_np(self._records[index], decoders=skip), where
        # The libraries do not say what a damaged file may raise: it has been RuntimeError and protobuf's DecodeError.
        except Exception as error:
            raise UnreadableFileError(f"{where}: cannot be read ({_reason(error)}); prepare the data again") from error

    def _decode_label(self, record: dict, where: str) -> np.ndarray:
        label = record[self._keys["label"]]
        if isinstance(label, bytes):
            values = read_label(io.BytesIO(label), where)
        else:
            values = np.asarray(self._features[self._keys["label"]].decode_example_np(label))
            if values.ndim == 3 and values.shape[-1] == 1:
                values = values[..., 0]
            if values.ndim != 2 or values.dtype.kind not in "biu":
                raise ValueError(
                    f"{where}: its label is {values.dtype} of shape {values.shape}, not whole numbers of (H, W); give"
                    " another --label-key"
                )
            values = values.astype(np.int64)
            outside = (values < 0) | (values > 255)
            if outside.any():
                raise ValueError(f"{where}: its label has the value {values[outside][0]}, outside 0..255")
        shifted = self._table[values]
        if (shifted < 0).any():
            value = values[shifted < 0].min()
            raise ValueError(
                f"{where}: its label has the value {value}, which --label-offset {self._offset} makes"
                f" {int(value) + self._offset}: give another offset, or --label-ignore 255 {value}"
            )
        return shifted.astype(np.uint8)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[-1]


def _shift_table(offset: int, ignored: Sequence[int]) -> np.ndarray:
    """What each value becomes: (256,) int64, -1 where it can be nothing."""
    values = np.arange(256)
    table = values + offset
    table[(table < 0) | (table >= IGNORE_LABEL)] = -1
    table[list(ignored)] = IGNORE_LABEL
    return table


class LocalInfo(tfds.core.DatasetInfo):
    """What TFDS knows of a data set that is made here, which its bucket on the network cannot have."""

    def initialize_from_bucket(self) -> None:
        """Looks nowhere. TFDS's own would leave an empty folder behind among the system's temporary ones."""


def prepare(
    make_builder: Callable[[], tfds.core.DatasetBuilder], data_dir: pathlib.Path
) -> tuple[tfds.core.DatasetBuilder, bool]:
    """Makes a builder and prepares its data set, unless that is done; returns it, and whether it was prepared now.

    Raises:
      NotADirectoryError: `data_dir` is a file.
      ValueError: as the builder's generators raise it.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise NotADirectoryError(f"{data_dir} is a file: give a folder for the data")
    with _quiet():
        builder = _make(make_builder, data_dir)
        if builder.is_prepared():
            return builder, False
    data_dir.mkdir(parents=True, exist_ok=True)
    with locked(data_dir / f"{builder.name}.lock"), _quiet():
        builder = _make(make_builder, data_dir)  # which looks again
        if builder.is_prepared():
            return builder, False
        for left in pathlib.Path(builder.data_dir).parent.glob("incomplete.*"):
            shutil.rmtree(left, ignore_errors=True)
        builder.download_and_prepare()
    return builder, True


def _make(make_builder: Callable[[], tfds.core.DatasetBuilder], data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    try:
        return make_builder()
    except OSError:
        raise
    except Exception as error:  # it reads what is there, and protobuf has errors of its own
        raise ValueError(f"{data_dir}: what is prepared there is damaged ({_reason(error)}); remove it") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what TFDS prints, logs and counts: the builders show their own progress."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()
