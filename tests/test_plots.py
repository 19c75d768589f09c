"""The figures: what they show can be computed by hand or read back from the pixels."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxseg import metrics, plots
from jaxseg.plots import confusion as matrix
from jaxseg.plots import curves, pictures, variants

COLOURS = ((0, 0, 0), (200, 0, 0), (0, 180, 0), (0, 0, 220))
NAMES = ("background", "red thing", "green thing", "blue thing")


def read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture - np.array(colour)).max(-1) <= 2).sum())


def make_example(height: int = 48, width: int = 64, label: int = 1, prediction: int = 2) -> plots.Example:
    image = np.full((height, width, 3), 100, np.uint8)
    return plots.Example(
        image, np.full((height, width), label, np.uint8), np.full((height, width), prediction, np.int32)
    )


def make_stage(name: str, steps: int, epochs: int, seed: int = 0, scale: float = 1.0) -> plots.StageHistory:
    generator = np.random.default_rng(seed)
    losses = scale * generator.uniform(0.5, 1.0, steps)
    return plots.StageHistory(
        name, np.arange(steps) + 1, losses, np.arange(epochs) + 1, generator.uniform(0, 1, epochs)
    )


def test_overlay_is_the_weighted_mean_of_brightness_and_colour():
    image = np.array([[[10, 20, 30], [255, 0, 0]]], np.uint8)
    label = np.array([[3, 3]], np.uint8)
    # Brightness: 0.299 * 10 + 0.587 * 20 + 0.114 * 30 = 18.15 and 0.299 * 255 = 76.245; a quarter of each is kept.
    expected = [[[5, 5, 170], [19, 19, 184]]]
    np.testing.assert_array_equal(plots.overlay(image, label, COLOURS, alpha=0.75), expected)


def test_overlay_darkens_the_pixel_before_a_border_and_no_other():
    image = np.zeros((3, 4, 3), np.uint8)
    label = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3]])
    red, green, blue = (200, 0, 0), (0, 180, 0), (0, 0, 220)
    dark_red, dark_green = (80, 0, 0), (0, 72, 0)
    expected = [[red, dark_red, green, green], [dark_red, dark_red, dark_green, dark_green], [blue] * 4]
    np.testing.assert_array_equal(plots.overlay(image, label, COLOURS, alpha=1.0), expected)


@pytest.mark.parametrize("void", [4, 255, -2])
def test_overlay_draws_what_is_no_class_in_neutral_grey(void):
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    drawn = plots.overlay(image, np.full((5, 6), void), COLOURS).astype(int)
    assert (drawn == drawn[..., :1]).all()
    assert drawn.min() >= 0.7 * plots.VOID_COLOUR[0] - 1
    assert len(np.unique(drawn)) > 1, "the photograph must shine through"


def test_overlay_leaves_its_arguments_alone_and_refuses_other_sizes():
    image, label = np.full((2, 3, 3), 9, np.uint8), np.array([[0, 1, 255], [2, 2, 3]], np.uint8)
    before = image.copy(), label.copy()
    drawn = plots.overlay(image, label, COLOURS)
    assert drawn.shape == (2, 3, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])
    with pytest.raises(ValueError, match=r"\(2, 3, 3\).*\(3, 2\)"):
        plots.overlay(image, label.T, COLOURS)


def random_counts(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    num_images, num_classes = generator.integers(1, 40), generator.integers(1, 12)
    counts = generator.integers(0, 5000, (num_images, num_classes))
    return counts * (generator.random((num_images, num_classes)) < generator.uniform(0.02, 0.8))


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_choose_examples_shows_every_class_once_chosen(first):
    for seed in range(first, first + 50):
        counts = random_counts(seed)
        num_images, num_classes = counts.shape
        for num_examples in (1, 4, 9):
            chosen = plots.choose_examples(counts, num_examples)
            assert all(type(index) is int and 0 <= index < num_images for index in chosen)
            assert len(set(chosen)) == len(chosen)
            assert min(num_examples, num_images) <= len(chosen) <= max(num_examples, num_classes)
            np.testing.assert_array_equal(counts[chosen].any(0), counts.any(0))
            assert chosen == plots.choose_examples(counts.copy(), num_examples)


def test_choose_examples_shows_a_class_well_where_there_is_room():
    for seed in range(50):
        counts = random_counts(seed)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        chosen = plots.choose_examples(counts, counts.shape[1])
        assert (share[chosen].max(0) >= 0.25 * share.max(0)).all()


def test_choose_examples_prefers_the_rare_class_large_and_with_others():
    counts = np.array(
        [
            [90, 10, 0, 0],  # class 1, small
            [50, 50, 0, 0],  # class 1, large
            [50, 0, 0, 50],  # class 3 alone
            [10, 45, 0, 45],  # class 3 nearly as large, and class 1
            [100, 0, 0, 0],
        ]
    )
    assert plots.choose_examples(counts, 1) == [3]
    assert plots.choose_examples(counts, 2)[0] == 3
    # Class 2 is a speck where class 1 is: it gets a picture of its own, before class 0 gets its best.
    assert plots.choose_examples(np.array([[0, 98, 2], [60, 0, 40], [100, 0, 0]]), 2) == [0, 1]
    # A speck of the rarest class among many others does not stand for it.
    speck, alone = [30, 34, 34, 2], [0, 0, 0, 50]
    others = [[0, 40, 60, 0], [0, 60, 40, 0], [50, 50, 0, 0], [50, 0, 50, 0]]
    assert plots.choose_examples(np.array([speck, alone, *others]), 3)[0] == 1
    # Twice as many pixels of a picture four times as large are a smaller share of it.
    assert plots.choose_examples(np.array([[60, 40], [320, 80]]), 1) == [0]


def test_choose_examples_fills_up_with_what_differs():
    # Three frames of one scene, and another scene that shows the same classes.
    counts = np.array([[50, 30, 20], [50, 31, 19], [51, 30, 19], [90, 6, 4]])
    assert plots.choose_examples(counts, 2) == [0, 3]


def test_choose_examples_of_nothing():
    assert plots.choose_examples(np.zeros((0, 3), int), 4) == []
    assert sorted(plots.choose_examples(np.zeros((2, 3), int), 4)) == [0, 1]
    assert plots.choose_examples(np.ones((3, 2), int), 0) != [], "coverage comes before the number"


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0), (1, 1), (3, 2), (400, 30)])
@pytest.mark.filterwarnings("error")
def test_training_draws_one_figure_per_stage(tmp_path, steps, epochs):
    history = [make_stage("stage 1: encoder frozen", steps, epochs), make_stage("stage 2", steps, epochs, 1, 0.01)]
    paths = plots.plot_training(history, tmp_path)
    assert paths == [tmp_path / "training_stage_1.png", tmp_path / "training_stage_2.png"]
    first, second = map(read, paths)
    assert first.shape == second.shape == (550, 1440, 3)
    assert (first != second).any()
    if steps:
        blue = (0x00, 0x72, 0xB2)
        assert count_colour(first[:, :720], blue) > 20 and count_colour(first[:, 720:], blue) > 20


@pytest.mark.filterwarnings("error")
def test_training_draws_a_loss_of_zero(tmp_path):
    stage = make_stage("stage", 30, 2)
    stage.losses[-3:] = 0
    (path,) = plots.plot_training([stage], tmp_path)
    assert count_colour(read(path)[:, :720], (0x00, 0x72, 0xB2)) > 20


def make_curves(number: int) -> list[plots.Curve]:
    return [plots.Curve(f"run {k}", "", make_stage("", 60, 5, k), ended=k == 0) for k in range(number)]


@pytest.mark.parametrize("number", [1, 6])
@pytest.mark.filterwarnings("error")
def test_the_curves_of_several_runs_are_in_one_figure_each_in_a_colour_of_its_own(tmp_path, number):
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in curves._ordered_colours(number)]
    brightness = np.array(colours) @ plots.LUMA
    assert (np.diff(brightness) > 5).all() and brightness.max() < 200
    for draw in (plots.plot_losses, plots.plot_mean_ious):
        draw(make_curves(number), "a title", tmp_path / "figure.png")
        picture = read(tmp_path / "figure.png")
        # In the panel and in the list beside it.
        for part in (picture[:, :1010], picture[:, 1040:]):
            assert min(count_colour(part, colour) for colour in colours) > 20
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert (edge == 255).all()


@pytest.mark.filterwarnings("error")
def test_runs_that_recorded_nothing_or_exploded_can_be_drawn(tmp_path):
    nothing, one = make_stage("", 0, 0), make_stage("", 1, 0)
    exploded = make_stage("", 50, 1)._replace(losses=np.geomspace(1, 1e30, 50))
    runs = [plots.Curve("a", "diverged at step 1", stage, ended=True) for stage in (nothing, one, exploded)]
    for number in range(1, 4):
        plots.plot_losses(runs[:number], "", tmp_path / f"{number}.png")
        plots.plot_mean_ious(runs[:number], "", tmp_path / f"{number}.png")
    assert (read(tmp_path / "1.png") != 255).any()


@pytest.mark.filterwarnings("error")
def test_bars_are_as_long_as_the_ious(tmp_path):
    ious = np.array([0.5, 1.0, np.nan]), np.array([0.25, np.nan, np.nan])
    names, models = ("sky", "a class with a name that is much too long", "car"), ("A: " + "long " * 20, "B: two")
    plots.plot_class_bars(ious, (0.75, 0.25), names, models, "a title", tmp_path / "figure.png")
    picture = read(tmp_path / "figure.png")
    lengths = []
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        found = np.abs(picture - np.array(colour)).max(-1) <= 2
        # Below the legend.
        widths = found[130:].sum(1)
        starts = np.nonzero(np.diff(np.concatenate([[0], widths > 0, [0]])) > 0)[0]
        lengths.append([int(widths[start + 5]) for start in starts])
    assert len(lengths[0]) == 3 and len(lengths[1]) == 2
    one = lengths[0][1]
    np.testing.assert_allclose(lengths[0], np.array([0.5, 1, 0.75]) * one, atol=2)
    np.testing.assert_allclose(lengths[1], np.array([0.25, 0.25]) * one, atol=2)
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()


def test_rows_may_have_any_number_of_class_maps(tmp_path):
    image, maps = np.full((20, 30, 3), 200, np.uint8), [np.full((20, 30), index) for index in (1, 2, 3)]
    row = plots.Row(image, tuple(maps), "a caption")
    (path,) = plots.plot_rows([row], ("photograph", "label", "A", "B: " + "x" * 90), NAMES, COLOURS, tmp_path / "r.png")
    picture = read(path)
    quarters = np.array_split(picture, 4, axis=1)
    for classes, quarter in zip(maps, quarters[1:], strict=True):
        colour = plots.overlay(image, classes, COLOURS)[5, 5]
        assert count_colour(quarter, colour) > 10_000 and count_colour(picture, colour) < 1.1 * count_colour(
            quarter, colour
        )
    with pytest.raises(ValueError, match="needs a A of that size"):
        plots.plot_rows([row._replace(maps=(maps[0], maps[1].T))], ("photograph", "label", "A"), NAMES, COLOURS, path)


@pytest.mark.parametrize("values", [[0.0593], [0.48, 0.5, 0.4801], [0.0, 1.0], [0.3, 0.6], [0.7], [0.39999, 0.40001]])
def test_ticks_are_round_numbers_around_the_scores(values):
    ticks = variants._choose_ticks(np.array(values))
    assert 2 <= len(ticks) <= 5
    assert ticks[0] <= min(values) + 1e-9 and max(values) - 1e-9 <= ticks[-1]
    np.testing.assert_allclose(ticks * 1000, np.round(ticks * 1000), atol=1e-6)
    # None is there for nothing.
    assert ticks[1] > min(values) - 1e-9 and ticks[-2] < max(values) + 1e-9


@pytest.mark.filterwarnings("error")
def test_variants_are_drawn_where_their_scores_are(tmp_path):
    blue = (0x00, 0x72, 0xB2)
    shown = [
        plots.Variant("baseline", {"validation": np.array([0.5]), "test": np.array([0.4])}),
        plots.Variant("better", {"validation": np.array([0.6]), "test": np.array([0.5])}),
        plots.Variant("worse", {"validation": np.array([0.55])}, note="diverged"),
    ]
    plots.plot_variants(shown, "a title", tmp_path / "figure.png")
    picture = read(tmp_path / "figure.png")
    marks = np.abs(picture - np.array(blue)).max(-1) <= 2
    rows, _ = np.nonzero(marks)
    places = []
    for band in np.split(np.arange(picture.shape[0]), np.nonzero(np.diff(marks.any(1)))[0] + 1):
        if marks[band].any():
            columns = np.unique(np.nonzero(marks[band])[1])
            places.append([part.mean() for part in np.split(columns, np.nonzero(np.diff(columns) > 5)[0] + 1)])
    assert [len(place) for place in places] == [2, 2, 1], rows
    (base, base_test), (better, better_test), (worse,) = places
    assert base < worse < better and base_test < better_test
    np.testing.assert_allclose(worse, (base + better) / 2, atol=1.5)
    plots.plot_variants([plots.Variant("a", {}, note="diverged")], "", tmp_path / "nothing.png")


def test_training_rings_the_best_epoch(tmp_path):
    stage = make_stage("stage", 5, 9)
    columns = []
    for best in (1, 7):
        mean_ious = np.full(9, 0.4)
        mean_ious[best] = 0.6
        (path,) = plots.plot_training([stage._replace(mean_ious=mean_ious)], tmp_path)
        ring = np.abs(read(path) - np.array((0xD5, 0x5E, 0x00))).max(-1) <= 2
        columns.append(np.nonzero(ring)[1].mean())
    # Six epochs of the nine on an axis of 0.385 * 1440 pixels.
    assert columns[1] - columns[0] == pytest.approx(6 / 9 * 0.385 * 1440, abs=3)


def test_moving_average_keeps_a_constant_and_lessens_noise():
    np.testing.assert_allclose(curves._moving_average(np.full(300, 2.5)), 2.5)
    noise = np.random.default_rng(0).normal(size=1000)
    smooth = curves._moving_average(noise)
    assert smooth.shape == noise.shape and smooth.std() < 0.4
    np.testing.assert_array_equal(curves._moving_average([3.0, 1.0]), [3.0, 1.0])
    # A straight line stays one where the window is whole.
    np.testing.assert_allclose(curves._moving_average(np.arange(100.0))[10:-10], np.arange(100.0)[10:-10])


@pytest.mark.parametrize("values", [[0.0], [0.03, 0.02], [0.41, 0.68], [0.95, 1.0], [0.0, 1.0]])
def test_mean_iou_limits_hold_the_values(values):
    low, high = curves._mean_iou_limits(np.array(values))
    assert 0 <= low <= min(values) and max(values) <= high <= 1 and high - low >= 0.2 - 1e-9


@pytest.mark.parametrize("size", [1, 2, 9, 25])
@pytest.mark.filterwarnings("error")
def test_confusion_of_any_size(tmp_path, size):
    generator = np.random.default_rng(size)
    confusion = generator.integers(0, 50, (size, size)) + np.diag(generator.integers(0, 2**40, size))
    names = [
        rf"class $\nonsense{{{index}$" if index else "a name too long to be drawn beside a matrix"
        for index in range(size)
    ]
    plots.plot_confusion(confusion, names, tmp_path / "confusion.png", title="validation")
    picture = read(tmp_path / "confusion.png")
    cell = np.clip(5.2 / size, 0.27, 0.55)
    assert picture.shape[0] > size * cell * plots.DPI and picture.shape[1] > (size * cell + 1.5) * plots.DPI
    assert max(picture.shape) < 12 * plots.DPI
    # Nothing is cut off at the page's edge.
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all()


def test_confusion_draws_each_cell_by_its_share_of_the_row(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(matrix, "write", lambda parent, x, y, text, *args, **style: texts.append((text, x, y)))
    confusion = np.array([[3000, 1000, 0, 0], [1, 999, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    confusion[0, 3] = 5
    plots.plot_confusion(confusion, NAMES, tmp_path / "confusion.png")
    positions = {text: (x, y) for text, x, y in texts}
    written = [text for text, *_ in texts]
    assert {"75", "25", "100"} <= set(written)  # 5 of 4005 and 1 of 1000 are under half a percent: blank
    assert positions["75"][1] == positions["25"][1] < positions["100"][1]
    assert positions["75"][0] < positions["25"][0] == positions["100"][0]
    assert written.count("no pixel has this label") == 2
    # The third class is nowhere; the fourth was predicted, wrongly: it has an IoU of 0, and counts.
    iou = metrics.iou_per_class(confusion)
    assert written.count("absent") == np.isnan(iou).sum() == 1
    assert [f"{value:.3f}" for value in iou[[0, 1, 3]]] == [text for text in written if text.startswith(("0.", "1."))]
    assert f"IoU, mean {metrics.mean_iou(confusion):.3f}" in written


def test_confusion_refuses_other_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"\(2, 3\).*4 names"):
        plots.plot_confusion(np.ones((2, 3), int), NAMES, tmp_path / "confusion.png")


def test_results_show_the_classes_in_their_colours(tmp_path):
    (path,) = plots.plot_results([make_example(label=1, prediction=2)], NAMES, COLOURS, tmp_path / "results.png")
    picture = read(path)
    assert path.name == "results_1.png" and picture.shape[1] == 1440
    third = 1440 // 3
    # Brightness 100, weight 0.3, and the colour's 0.7: large areas, each in its own third of the page.
    red, green = (170, 30, 30), (30, 156, 30)
    assert [count_colour(picture[:, i * third : (i + 1) * third], (100, 100, 100)) > 50000 for i in range(3)] == [
        1,
        0,
        0,
    ]
    assert [count_colour(picture[:, i * third : (i + 1) * third], red) > 50000 for i in range(3)] == [0, 1, 0]
    assert [count_colour(picture[:, i * third : (i + 1) * third], green) > 50000 for i in range(3)] == [0, 0, 1]
    # The legend has the classes on the page, and no others.
    assert [count_colour(picture, colour) > 300 for colour in COLOURS[1:]] == [True, True, False]


def test_results_have_void_in_the_legend_if_a_label_has_it(tmp_path):
    example = make_example()
    label = example.label.copy()
    label[0, 0] = 255
    swatches = []
    for one in (example, example._replace(label=label)):
        picture = read(plots.plot_results([one], NAMES, COLOURS, tmp_path / "results.png")[0])
        swatches.append(count_colour(picture[-60:], plots.VOID_COLOUR) > 300)
    assert swatches == [False, True]


def test_results_change_when_label_and_prediction_are_swapped(tmp_path):
    example = make_example()
    swapped = example._replace(label=example.prediction, prediction=example.label)
    pictures = []
    for name, one in (("a", example), ("b", swapped)):
        pictures.append(read(plots.plot_results([one], NAMES, COLOURS, tmp_path / f"{name}.png")[0]))
    assert (pictures[0] != pictures[1]).any(-1).mean() > 0.2


@pytest.mark.parametrize("scale", [3.4, 1.0, 0.7, 0.2])
def test_pictures_take_each_class_from_its_own_place(scale):
    # 40 rows and 60 columns in blocks of 20: at any size the block's middle has the block's class.
    label = np.array([[1, 2, 3], [3, 255, 1]]).repeat(20, 0).repeat(20, 1)
    example = plots.Example(np.zeros((40, 60, 3), np.uint8), label, (label % 5 + 1) % 4)
    row = plots.Row(example.image, (example.label, example.prediction), "")
    photo, drawn, predicted = pictures.scaled_pictures(row, ("label", "prediction"), np.array(COLOURS), scale)
    height, width = photo.shape[:2]
    assert photo.shape == drawn.shape == predicted.shape and 3 * height == 2 * width
    assert scale <= height / 40 < max(2 * scale, scale + 1)
    rows, columns = np.array([1, 3]) * height // 4, np.array([1, 3, 5]) * width // 6
    palette = np.array([*COLOURS, plots.VOID_COLOUR])
    index = np.array([[1, 2, 3], [3, 4, 1]])
    np.testing.assert_array_equal(drawn[rows[:, None], columns], np.rint(0.7 * palette[index]))
    index = np.array([[2, 3, 0], [0, 1, 2]])
    np.testing.assert_array_equal(predicted[rows[:, None], columns], np.rint(0.7 * palette[index]))


@pytest.mark.parametrize(("count", "pages"), [(0, []), (1, [1]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_results_are_split_over_files_of_about_equal_length(tmp_path, monkeypatch, count, pages):
    lengths = []
    monkeypatch.setattr(pictures, "_plot_page", lambda rows, *args: lengths.append(len(rows)))
    paths = plots.plot_results([make_example()] * count, NAMES, COLOURS, tmp_path / "results.png")
    assert lengths == pages
    assert [path.name for path in paths] == [f"results_{number + 1}.png" for number in range(len(pages))]


@pytest.mark.filterwarnings("error")
def test_results_of_mixed_sizes_with_void_and_long_names(tmp_path):
    names = ["a class whose name goes on for much longer than any name should", r"$\nonsense{$", "c" * 90, "d"]
    names += [f"one of the many other classes {index}" for index in range(20)]
    colours = np.random.default_rng(0).integers(0, 200, (len(names), 3), dtype=np.uint8)
    examples = []
    for seed, (height, width) in enumerate([(30, 40), (300, 20), (1, 1), (700, 1300)]):
        label = np.random.default_rng(seed).integers(0, len(names), (height, width)).astype(np.uint8)
        prediction = label.astype(np.int32)
        label[: height // 3] = 255
        image = np.full((height, width, 3), 128, np.uint8)
        examples.append(plots.Example(image, label, prediction, "stem" * (30 * seed), 0.5))
    (path,) = plots.plot_results(examples, names, colours, tmp_path / "results.png")
    picture = read(path)
    assert picture.shape[1] == 1440
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert (edge == 255).all(), "something reaches the page's edge"


def test_results_refuse_a_prediction_of_another_size(tmp_path):
    example = make_example()._replace(prediction=np.zeros((48, 63), int))
    with pytest.raises(ValueError, match=r"48x64.*prediction"):
        plots.plot_results([example], NAMES, COLOURS, tmp_path / "results.png")


def test_caption_lists_the_predicted_classes_by_size():
    example = make_example(4, 4)._replace(prediction=np.array([[3] * 4, [3] * 4, [0] * 4, [1, 0, 0, 0]]))
    text = pictures._caption(example, ["sky", "b", "c", "d"])
    assert text == "predicted: d, sky, b"
    text = pictures._caption(example._replace(name="0016", mean_iou=0.25), ["sky", "b", "c", "d"])
    assert text == "0016 · mIoU 0.250 · predicted: d, sky, b"


def test_figures_are_functions_of_their_arguments(tmp_path):
    example, stage = make_example(), make_stage("stage", 100, 4)
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        plots.plot_training([stage], folder)
        plots.plot_confusion(np.eye(4, dtype=int), NAMES, folder / "confusion.png")
        plots.plot_results([example], NAMES, COLOURS, folder / "results.png")
        written.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert written[0] == written[1] and len(written[0]) == 3


def test_no_pyplot_and_no_global_state(tmp_path):
    code = f"""
import pathlib, sys
import matplotlib
# Looking up the backend would itself import pyplot.
settings = lambda: {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()
import numpy as np
from jaxseg import plots
path = pathlib.Path({str(tmp_path)!r})
plots.plot_confusion(np.eye(2, dtype=int), ["a", "b"], path / "confusion.png")
plots.plot_training([plots.StageHistory("s", np.arange(3), np.ones(3), np.arange(1), np.ones(1))], path)
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
assert "jax" not in sys.modules, "drawing needs no jax"
assert settings() == before, "the style leaked"
"""
    root = pathlib.Path(plots.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
