"""The frozen encoder's features, computed once for all epochs: the same training as without."""

import tempfile

import jax
import numpy as np
import pytest

from experiments import features
from experiments import prepare as preparing
from experiments.settings import parse
from experiments.stop import Stop
from jaxseg import train
from jaxseg.data.loader import resize_image
from tests.peers import small_run


@pytest.fixture
def folder(tmp_path):
    """Nine pictures to train on, of several sizes, and two to validate on."""
    return small_run.write_folder(
        tmp_path / "data", {"train": 9, "val": 2}, shape=lambda index: (40, 50 + 10 * (index % 3))
    )


def arguments(folder, workdir, *more):
    options = ["--dataset", f"folder:{folder}", "--num-classes", "2", "--weights", "none", "--image-size", "33", "64"]
    options += ["--batch-size", "4", "--epochs", "2", "1", "--max-degrees", "0", "--workdir", str(workdir)]
    return [*options, *more]


@pytest.fixture
def prepared(folder, tmp_path, monkeypatch):
    """(options) -> the run, with the small encoder."""
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    (tmp_path / "run").mkdir()

    def prepare(*options):
        settings = parse("improved", "", arguments(folder, tmp_path / "run", *options))
        return preparing.prepare(settings, small_run.make_decoder)

    return prepare


def compute(run, number=1, stop=None):
    return features.compute_features(run, number, train.replicate(run.variables, run.devices), stop or Stop())


def test_a_run_in_bfloat16_follows_one_in_float32(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    losses = []
    for dtype in ("float32", "bfloat16"):
        argv = [*arguments(folder, tmp_path / dtype), "--epochs", "2", "1", "--dtype", dtype]
        assert small_run.main(argv) == 0
        losses.append([float(row["loss"]) for row in small_run.rows(tmp_path / dtype) if row["kind"] == "step"])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_they_are_those_of_every_image_in_order(prepared, monkeypatch, capsys):
    run = prepared()
    kept = compute(run)
    assert "of the 9 training images are computed once, 0 MiB in memory" in capsys.readouterr().out
    assert kept.shape == (9, 2, 2, 8) and kept.any()
    images = np.stack([resize_image(run.splits["train"][index]["image"], (33, 64)) for index in range(9)])
    expected = jax.jit(lambda x: run.model.apply(run.variables, x, method="encode"))(images)
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-5)
    # In a file, which has no name, they are the same.
    monkeypatch.setattr(features, "_IN_MEMORY", 0)
    in_file = compute(run)
    assert isinstance(in_file, np.memmap) and not in_file.flags.writeable
    assert "in a temporary file in" in capsys.readouterr().out and not list(run.settings.workdir.iterdir())
    np.testing.assert_array_equal(in_file, kept)


@pytest.mark.parametrize(
    ("options", "number"),
    [
        (["--no-cache-features"], 1),
        (["--max-degrees", "1"], 1),
        (["--flip"], 1),
        (["--jitter", "0", "0", "0.1", "0"], 1),
        (["--augment", "scale-crop"], 1),
        (["--epochs", "1", "2"], 1),
        ([], 2),
    ],
)
def test_where_they_would_be_wrong_or_of_no_use_there_are_none(prepared, options, number):
    assert compute(prepared(*options), number) is None


def test_a_full_disk_costs_time_only(prepared, monkeypatch, capsys):
    def refuse(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert compute(prepared()) is None
    assert "No space left on device" in capsys.readouterr().err


def test_a_stage_that_is_over_computes_none(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    argv = [*arguments(folder, tmp_path / "whole"), "--epochs", "2", "0"]
    assert small_run.main(argv) == 0 and "are computed once" in capsys.readouterr().out
    assert small_run.main(argv) == 0
    out = capsys.readouterr().out
    assert "which is over" in out and "are computed once" not in out


def test_it_can_be_stopped(prepared):
    stop = Stop()
    stop.ask(2)
    assert compute(prepared(), stop=stop) is None


def test_a_run_has_the_same_losses_with_and_without(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    losses = []
    for name, options in (("with", []), ("without", ["--no-cache-features"])):
        assert small_run.main([*arguments(folder, tmp_path / name), *options, "--epochs", "2", "0"]) == 0
        losses.append([float(row["loss"]) for row in small_run.rows(tmp_path / name)])
    assert len(losses[0]) == 2 * 3  # two updates and their mean in each epoch
    np.testing.assert_allclose(*losses, rtol=1e-5)
