"""Data sets made from pairs of an image and a label file, written as TFDS's array_record files without TensorFlow."""

import dataclasses
import io
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import tensorflow_datasets as tfds

from jaxseg.data.images import UnreadableFileError, label_size, read_image
from jaxseg.data.records import LocalInfo, RecordSource, prepare
from jaxseg.data.threads import map_ahead

Item = TypeVar("Item")
Result = TypeVar("Result")
# How many skipped files are listed.
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Pair:
    """An example to be written.

    Attributes:
      name: what it is called.
      image: a JPEG or PNG file.
      label: a PNG file, 8-bit grey.
    """

    name: str
    image: bytes
    label: bytes


@dataclasses.dataclass(kw_only=True)
class PairsConfig(tfds.core.BuilderConfig):
    """What a data set is made from. Everything that changes the data is in `name`, which is a folder on disk.

    Attributes:
      read: gives the pairs of each split, and a dictionary of what is worth keeping beside them, which may be filled
        while the pairs are read.
    """

    read: Callable[[], tuple[Mapping[str, Iterator[Pair]], dict]]


class PairsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes what a `PairsConfig` reads; a subclass gives it a name and a version."""

    def __init__(self, **kwargs: object):
        # TFDS would otherwise choose tfrecord, which only TensorFlow can write.
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        """The features: encoded images, which are kept as they are."""
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.Image(shape=(None, None, 1)),
            "name": tfds.features.Text(),
        }
        return LocalInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        """One generator per split."""
        pairs, notes = self.builder_config.read()
        return {split: self._generate_examples(pairs[split], notes) for split in pairs}

    def _generate_examples(self, pairs: Iterator[Pair], notes: dict) -> Iterator[tuple[int, dict]]:
        """The pairs as TFDS wants them."""
        for index, pair in enumerate(pairs):
            yield index, {"image": io.BytesIO(pair.image), "label": io.BytesIO(pair.label), "name": pair.name}
        self.info.metadata.update(notes)


def make_pair(name: str, image: bytes, where: str, label: bytes) -> Pair:
    """An example of an image file as it is and a label as PNG.

    Raises:
      UnreadableFileError: the image, which messages call `where`, cannot be read, or its label has another size.
    """
    height, width = read_image(io.BytesIO(image), where).shape[:2]
    label_height, label_width = label_size(io.BytesIO(label))
    if (height, width) != (label_height, label_width):
        raise UnreadableFileError(
            f"{where}: is {width}x{height} (width x height), but its label is {label_width}x{label_height}"
        )
    return Pair(name, image, label)


def open_pairs(
    builder_class: type[PairsBuilder], config: PairsConfig, data_dir: pathlib.Path
) -> tuple[dict[str, RecordSource], bool]:
    """Opens a data set, preparing it first if need be; lists what was skipped.

    Returns:
      A source for each split, and whether the data set was prepared now.

    Raises:
      As `prepare` does.
    """
    builder, new = prepare(lambda: builder_class(data_dir=data_dir, config=config), data_dir)
    if skipped := builder.info.metadata.get("skipped"):
        print(f"warning: {builder.name} is prepared without {len(skipped)} images:", file=sys.stderr)
        print("\n".join(skipped[:_SHOWN]), file=sys.stderr)
        if len(skipped) > _SHOWN:
            print(f"... {builder.data_dir}/metadata.json has all of them", file=sys.stderr)
    return {split: RecordSource(builder, split) for split in builder.info.splits}, new


def read_good(
    function: Callable[[Item], Result], items: Iterable[Item], skipped: list[str] | None, update: Callable[[], object]
) -> Iterator[Result]:
    """Gives function(item) for each item, computed in threads, in order.

    Args:
      function: raises UnreadableFileError where a file cannot be used.
      items: whatever it takes.
      skipped: takes the messages of those errors, and their items are left out; None to raise the first.
      update: called for every item.
    """

    def attempt(item: Item) -> Result | UnreadableFileError:
        try:
            return function(item)
        except UnreadableFileError as error:
            return error

    for result in map_ahead(attempt, items):
        update()
        if not isinstance(result, UnreadableFileError):
            yield result
        elif skipped is None:
            raise UnreadableFileError(f"{result}; or leave such files out with --skip-bad") from result
        else:
            skipped.append(str(result))
