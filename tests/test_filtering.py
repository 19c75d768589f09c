"""The filtering experiment and its figures."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import filtering
from experiments.filtering import Settings, apply_filters
from jaxseg import plots

FILES = {*filtering.FIGURES.values(), filtering.RECORD}


@pytest.fixture
def photograph(tmp_path):
    """A grey ramp with a bright noisy block in it."""
    image = np.broadcast_to(np.arange(90, dtype=np.uint8)[None, :, None], (70, 90, 3)).copy()
    image[20:40, 30:60] = np.random.default_rng(0).integers(150, 256, (20, 30, 3))
    path = tmp_path / "photo graph.png"
    Image.fromarray(image).save(path)
    return path


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_figures_are_drawn_and_explained(photograph, tmp_path, capsys):
    stale = tmp_path / "some" / "where" / filtering.FIGURES[25]
    stale.parent.mkdir(parents=True)
    stale.write_text("an earlier call's")
    assert filtering.main([str(photograph), "--output", str(stale.parent)]) == 0
    assert read(stale).shape[1] == 1440
    out = capsys.readouterr().out
    assert f"{photograph}: 90x70 pixels" in out
    assert {path.name for path in (tmp_path / "some" / "where").iterdir()} == FILES
    paragraphs = out.split("\n\n")[1:4]
    for number, paragraph in zip((24, 25, 26), paragraphs, strict=True):
        heading, text = paragraph.split("\n")[:2]
        assert heading == f"Figure {number}, {tmp_path / 'some' / 'where' / filtering.FIGURES[number]}"
        assert text.endswith(".") and text.count(". ") == 1, "two sentences"


def test_without_an_image_the_one_that_matplotlib_ships(tmp_path, capsys):
    assert filtering.main(["--output", str(tmp_path), "--more-sigmas"]) == 0
    assert "grace_hopper.jpg: 512x600 pixels" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "4"], "odd and at least 1, not 4"),
        (["--sigma", "0"], "sigma must be above 0 and finite, not 0.0"),
        (["--more-sigmas", "2", "-1"], "sigma must be above 0 and finite, not -1.0"),
        (["--more-sigmas", "nan"], "sigma must be above 0 and finite, not nan"),
        (["--more-sigmas", "1e308"], "the kernel of sigma 1e+308 would have 6007 taps: 1001"),
        (["--size", "100001"], "would have 100001 taps: 1001"),
        (["--more-sigmas", "1", "2", "3", "4"], "--more-sigmas takes at most 3"),
        (["--border", "mirror"], "unknown border mode 'mirror': use one of symmetric, "),
        (["--output", __file__], __file__),
    ],
)
def test_values_out_of_range_are_refused_in_a_line(photograph, tmp_path, capsys, options, said):
    output = tmp_path / "figures"
    assert filtering.main([str(photograph), "--output", str(output), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert not output.exists()


def test_images_that_cannot_be_read_are_named(photograph, tmp_path, capsys):
    corrupt, text = tmp_path / "corrupt.png", tmp_path / "text.jpg"
    corrupt.write_bytes(photograph.read_bytes()[:300])
    text.write_text("no image")
    for path in (tmp_path / "nowhere.jpg", tmp_path, corrupt, text):
        assert filtering.main([str(path), "--output", str(tmp_path / "figures")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: {path}: ")
    assert not (tmp_path / "figures").exists()


def test_help_explains_every_option_without_loading_jax_or_matplotlib():
    code = (
        "import sys; from experiments.filtering import main\n"
        "try: main(['--help'])\n"
        "finally: print({'jax', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert out.strip().endswith("set()")
    for option in ("IMAGE", "--size", "--sigma", "--more-sigmas", "--border", "--output"):
        assert option in out


def test_what_is_drawn_is_of_the_brightness_and_of_each_blur():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    filtered = apply_filters(image, Settings(more_sigmas=(0.5, 4)))
    assert filtered.names == ["3x3, σ = 0.721", "5x5, σ = 0.5", "25x25, σ = 4"]
    i_y, i_x = np.gradient(image @ np.array([0.299, 0.587, 0.114]))
    inside = np.s_[1:-1, 1:-1]
    for got, expected in ((filtered.i_x, i_x), (filtered.i_y, i_y), (filtered.magnitude, np.hypot(i_x, i_y))):
        np.testing.assert_allclose(got[inside], expected[inside], atol=1e-3)
    deviations = [one.std() for one in filtered.blurred]
    means = [one.mean() for one in filtered.blurred_magnitudes]
    # Of noise the wider Gaussian leaves less.
    assert deviations[2] < deviations[0] < deviations[1] and means[2] < means[0] < means[1]


def test_pictures_of_values_by_hand():
    np.testing.assert_array_equal(
        plots.signed_picture(np.array([[-9.0, -2, -1, 0, 1, 2, 9]]), 2.0), [[0, 0, 64, 128, 191, 255, 255]]
    )
    np.testing.assert_array_equal(plots.magnitude_picture(np.array([[0, 0.5, 2, 9]]), 2.0), [[255, 191, 0, 0]])


@pytest.mark.parametrize("shape", [(1, 1), (48, 64), (20, 200), (100, 30), (70, 90)])
def test_the_detail_is_the_window_with_the_largest_sum(shape):
    values = np.random.default_rng(0).integers(0, 100, shape)
    top, left = plots.choose_detail(values)
    height, width = min(48, shape[0]), min(64, shape[1])
    sums = {
        (y, x): values[y : y + height, x : x + width].sum()
        for y in range(shape[0] - height + 1)
        for x in range(shape[1] - width + 1)
    }
    assert sums[top, left] == max(sums.values())
    assert plots.choose_detail(np.full(shape, 0.1)) == (0, 0)


def test_every_panel_shows_its_picture_and_below_it_its_detail(tmp_path):
    colours = ((200, 0, 0), (0, 180, 0), (0, 0, 220))
    panels = []
    for colour in colours:
        picture = np.full((96, 128, 3), 128, np.uint8)
        picture[30:78, 50:114] = colour
        panels.append(plots.Panel("a title", "a note", picture))
    plots.plot_filtered(panels, (30, 50), tmp_path / "figure.png")
    drawn = read(tmp_path / "figure.png")
    assert drawn.shape[1] == 1440
    for index, colour in enumerate(colours):
        third = drawn[:, index * 480 : (index + 1) * 480]
        matches = (np.abs(third - np.array(colour)).max(-1) <= 2).sum(1)
        # The detail fills a panel, 453 printed pixels wide; in the picture above it the same is half as wide.
        assert (matches > 440).sum() == pytest.approx(340, abs=3)
        assert ((matches > 215) & (matches < 230)).sum() > 150
        for other in set(colours) - {colour}:
            assert not (np.abs(third - np.array(other)).max(-1) <= 2).any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (900, 20), (600, 512, 3)])
@pytest.mark.filterwarnings("error")
def test_pictures_of_any_shape_stay_on_the_page(tmp_path, shape):
    picture = np.zeros(shape, np.uint8)
    plots.plot_filtered([plots.Panel("t", "n", picture)] * 4, (0, 0), tmp_path / "figure.png")
    drawn = read(tmp_path / "figure.png")
    for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
        assert (edge == 255).all()
    assert drawn.shape[0] < 8 * plots.DPI


def test_pictures_of_different_sizes_are_refused(tmp_path):
    panels = [plots.Panel("a", "", np.zeros(shape, np.uint8)) for shape in ((4, 5), (4, 6))]
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 6\)"):
        plots.plot_filtered(panels, (0, 0), tmp_path / "figure.png")
