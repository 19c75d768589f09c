"""Class names and colours: the VOC palette by its own rule, `classes.txt` by its lines, defaults that differ enough."""

import itertools
import re

import numpy as np
import pytest

from jaxseg.data.labels import IGNORE_LABEL, VOC9, Labels, default_colours, name_classes, read_classes

# Where the report's classes are among VOC's twenty-one.
VOC_INDEX = {
    "background": 0,
    "person": 15,
    "aeroplane": 1,
    "bus": 6,
    "tv/monitor": 20,
    "horse": 13,
    "dog": 12,
    "cat": 8,
    "car": 7,
}


def voc_colour(index: int) -> tuple[int, ...]:
    """PASCAL VOC's rule: the index's bits, three at a time, fill red, green and blue from the highest bit down."""
    colour = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            colour[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return tuple(colour)


def test_voc9_is_the_report_s_order_in_voc_s_colours():
    assert VOC9.num_classes == 9
    assert VOC9.names == tuple(VOC_INDEX)
    assert VOC9.colours == tuple(voc_colour(index) for index in VOC_INDEX.values())


@pytest.mark.parametrize("num_classes", [1, 2, 9, 21, 60, 255])
def test_default_colours_can_be_told_apart(num_classes):
    colours = default_colours(num_classes)
    assert len(set(colours)) == num_classes
    assert np.array(colours).min() >= 0 and np.array(colours).max() <= 255
    assert default_colours(255)[:num_classes] == colours
    luma = np.array(colours) @ [0.299, 0.587, 0.114]
    assert luma.min() > 20 and luma.max() < 245  # neither black, the background, nor white, the ignored pixels
    if num_classes <= 21:
        differences = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(colours, 2)]
        assert min(differences, default=255) > 60


@pytest.mark.parametrize("num_classes", [-1, 0, 256])
def test_default_colours_refuse_what_labels_cannot_hold(num_classes):
    with pytest.raises(ValueError, match=re.escape(f"{num_classes} is outside 1..{IGNORE_LABEL}")):
        name_classes(num_classes)


def test_read_classes(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(
        "\ufeff# my classes\n\nbackground\n  traffic sign \t #FF8000 \r\n#another comment\n"
        "class 3\nroad 1 2 3\nC#\ntv/monitor  #00ff00",
        encoding="utf-8",
    )
    labels = read_classes(path)
    assert labels.names == ("background", "traffic sign", "class 3", "road", "C#", "tv/monitor")
    assert labels.colours[:2] == ((0, 0, 0), (255, 128, 0))
    assert labels.colours[3] == (1, 2, 3) and labels.colours[5] == (0, 255, 0)
    assert len(set(labels.colours)) == 6


def test_read_classes_gives_what_was_written(tmp_path):
    path = tmp_path / "classes.txt"
    for template in ("{} #{:02x}{:02x}{:02x}", "{} {} {} {}"):
        lines = [template.format(name, *colour) for name, colour in zip(VOC9.names, VOC9.colours, strict=True)]
        path.write_text("\n".join(lines))
        assert read_classes(path) == VOC9


def test_a_first_class_that_is_no_background_is_not_black(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sky\nbackground\n")
    assert (0, 0, 0) not in read_classes(path).colours


def test_colours_left_out_keep_away_from_those_given(tmp_path):
    path = tmp_path / "classes.txt"
    given = default_colours(3)
    path.write_text("a {} {} {}\nb {} {} {}\nc\nd\n".format(*given[0], *given[2]))
    colours = read_classes(path).colours
    differences = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(colours, 2)]
    assert min(differences) > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 classes"),
        ("# only\n\n# comments\n", "0 classes"),
        ("a\nb\na\n", "line 3: class 'a' was already named in line 1"),
        ("a\n#ff0000\n", "line 2: the colour '#ff0000' has no name"),
        ("a\n1 2 3\n", "line 2: the colour '1 2 3' has no name"),
        ("a 256 0 0\n", r"line 1: colour (256, 0, 0) is outside 0..255"),
        ("a -1 0 0\n", r"line 1: colour (-1, 0, 0) is outside 0..255"),
        ("a\nb #12345\n", "line 2: 'b #12345' has a '#' that begins no colour"),
        ("a #112233 # the first\n", "line 1: 'a #112233 # the first' has a '#'"),
        ("\n".join(f"c{k}" for k in range(256)), "256 classes"),
    ],
)
def test_read_classes_names_the_file_and_the_line(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_classes(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_read_classes_refuses_what_is_not_text(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"classes.txt: not a UTF-8 text file \(.*\): save it as UTF-8"):
        read_classes(path)


def test_labels_need_a_colour_for_each_name():
    with pytest.raises(ValueError, match="2 class names but 1 colours"):
        Labels(("a", "b"), ((0, 0, 0),))
