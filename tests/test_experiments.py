"""The commands, as a user types them: what they write, and what they say about a mistake."""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from experiments import baseline, improved
from experiments import prepare as preparing
from experiments.datasets import find_data
from experiments.prepare import prepare
from experiments.processes import ALONE, Processes
from experiments.results import stage_difference
from experiments.run import describe_run, how_to_go_on, what_is_kept
from experiments.settings import Options, complete, describe_schedule, differences, parse, to_json
from experiments.workdir import differ
from jaxseg import checkpoint
from jaxseg.data import loader, shapes
from jaxseg.data.folder import open_folder
from jaxseg.decoders import BaselineDecoder
from jaxseg.pretrained import encoder_shapes, load_encoder, save_torch
from jaxseg.resnet import VARIANTS, BasicBlock, Bottleneck
from jaxseg.train import AXIS, TrainState
from tests.peers import small_run


@pytest.fixture
def folder(tmp_path):
    """A data set of small pictures whose two classes differ in brightness; sizes are mixed."""
    root = tmp_path / "data set"
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 3), ("test", 1)):
        for part in ("img", "seg"):
            (root / split / part).mkdir(parents=True)
        for index in range(number):
            height, width = 32 + 8 * (index % 4), 48
            label = np.zeros((height, width), np.uint8)
            label[:, : 16 + 2 * index] = 1
            label[:2] = 255
            image = 60 + 120 * (label[..., None] == 1) + rng.integers(0, 40, (height, width, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / split / "img" / f"{index}.jpg")
            Image.fromarray(label).save(root / split / "seg" / f"{index}.png")
    (root / "classes.txt").write_text("dark\nbright #ff8000\n")
    return root


def arguments(folder, workdir, *more):
    options = ["--dataset", f"folder:{folder}", "--weights", "none", "--image-size", "32", "32", "--batch-size", "4"]
    options += ["--learning-rate", "1e-3", "3e-4", "--schedule", "cosine", "--decoder-init", "prior"]
    return [*options, "--epochs", "2", "2", "--workdir", str(workdir), *more]


def fails(capsys, argv):
    """Runs the baseline, which must refuse its arguments before training; returns its one line."""
    code = baseline.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture
def compiled():
    """How often each function has been compiled since the test began, by XLA's name for it."""
    counts = collections.Counter()

    def count(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.fixture
def shallow_resnet18(monkeypatch):
    """A ResNet-18 with one block in each group: its five programs compile in half the time."""
    monkeypatch.setitem(VARIANTS, "resnet18", (BasicBlock, (1, 1, 1, 1)))


def test_a_run_leaves_everything_in_its_workdir(folder, tmp_path, capsys, compiled, shallow_resnet18):
    workdir = tmp_path / "runs" / "one"
    assert baseline.main(arguments(folder, workdir)) == 0
    # The frozen encoder, a training step for each stage, one evaluation for each split (their labels differ in size),
    # the prediction of the pictures; and none of them twice, though each stage has two epochs.
    steps = {name: number for name, number in compiled.items() if name.endswith("_step)")}
    assert steps == {"jit(encode_step)": 1, "jit(train_step)": 2, "jit(eval_step)": 2, "jit(predict_step)": 1}
    out = capsys.readouterr().out
    assert "stage 1: encoder frozen: trains decoder (" in out and "keeps encoder (4,905,792 parameters)" in out
    assert (
        "class #1 : " in out
        and "  bright" in out
        and out.count("mean_iou: ") == 3
        and "best on the validation split: stage" in out
    )
    assert "stage 2 added" in out and "test split" in out and str(workdir) in out
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints", "config.json", "events", "figures", "metrics.csv", "results.json",
    }  # fmt: skip
    assert {path.name for path in (workdir / "figures").iterdir()} == {
        "training_stage_1.png", "training_stage_2.png", "architecture.png", "confusion.png", "results_1.png",
    }  # fmt: skip
    results = json.loads((workdir / "results.json").read_text())
    assert results["checkpoint"]["stage"].startswith("stage ") and results["checkpoint"]["epoch"] in (1, 2)
    labelled = sum((np.array(Image.open(path)) != 255).sum() for path in (folder / "val" / "seg").iterdir())
    assert np.sum(results["val"]["confusion"]) == labelled
    rows = list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))
    places = [(row["kind"], row["stage"], row["epoch"], row["step"]) for row in rows]
    assert places == [
        (kind, stage, epoch, str(step))
        for stage, epoch, last in (("1", "1", 2), ("1", "2", 4), ("2", "1", 6), ("2", "2", 8))
        for kind, step in (("step", last - 1), ("step", last), ("epoch", last))
    ]
    # Of a stage's four steps the first leads up to the highest rate, the others go down a cosine.
    rates = [float(row["learning_rate"]) for row in rows if row["kind"] == "step"]
    np.testing.assert_allclose(rates, np.outer([1e-3, 3e-4], [1, 1, 0.75, 0.25]).ravel(), rtol=1e-6)
    assert max(float(row["mean_iou"]) for row in rows if row["kind"] == "epoch") == results["val"]["mean_iou"]
    assert json.loads((workdir / "config.json").read_text())["names"] == ["dark", "bright"]
    # A run of other settings does not write over the first, and neither does one into a folder of something else.
    assert "--seed 0 there, 1 here" in fails(capsys, [*arguments(folder, workdir), "--seed", "1"])
    assert "is not empty" in fails(capsys, arguments(folder, folder))


@pytest.fixture
def shallow_resnet50(monkeypatch):
    """A ResNet-50 with one bottleneck block in each group: compiling all sixteen takes most of a minute."""
    monkeypatch.setitem(VARIANTS, "resnet50", (Bottleneck, (1, 1, 1, 1)))
    monkeypatch.setattr("experiments.run.draw", lambda *_: None)
    monkeypatch.setattr("jaxseg.train.all_devices", lambda: jax.devices()[:1])


def test_a_resnet_50_trains(folder, tmp_path, capsys, shallow_resnet50):
    """From a file of weights, both stages; tests/test_resnet.py has all its blocks."""
    workdir, weights = tmp_path / "run", tmp_path / "resnet50.safetensors"
    shutil.rmtree(folder / "test")
    draw = np.random.default_rng(0).standard_normal
    flat = {
        path: draw(shape, np.float32) / np.float32(np.prod(shape[:-1]) ** 0.5)
        if len(shape) == 4
        else np.ones(shape, np.float32)
        for path, shape in encoder_shapes("resnet50").items()
    }
    save_torch(traverse_util.unflatten_dict(flat), weights)
    options = ["--encoder", "resnet50", "--weights", str(weights), "--batch-size", "8", "--epochs", "1", "1"]
    assert baseline.main([*arguments(folder, workdir), *options]) == 0
    total = sum(leaf.size for path, leaf in flat.items() if path[0] == "params")
    assert f"keeps encoder ({total:,} parameters)" in capsys.readouterr().out
    rows = list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows if row["kind"] == "step"] == ["1", "2"]
    kernel = ("params", "layer3_0", "conv3", "kernel")
    kernels = [
        traverse_util.flatten_dict(load_encoder("resnet50", workdir / "checkpoints" / number))[kernel]
        for number in "12"
    ]
    np.testing.assert_array_equal(kernels[0], flat[kernel])
    assert kernels[1].shape == (1, 1, 256, 1024) and not np.array_equal(*kernels)


def test_a_summary_trains_nothing_and_writes_nothing(folder, tmp_path, capsys):
    assert improved.main([*arguments(folder, tmp_path / "run"), "--summary"]) == 0
    out = capsys.readouterr().out
    assert "decoder/bn5" in out and "11,176,512" in out
    assert not (tmp_path / "run").exists()


def check_boundary_iou(folder, out, results):
    """The tables of the best epoch have a second column, which results.json holds too; the others have one."""
    tables = out.partition("best on the validation split")[2]
    assert out.count("mean_boundary_iou: ") == tables.count("mean_boundary_iou: ") == 2
    for split, table in zip(("val", "test"), tables.split("test split"), strict=True):
        assert f"mean_boundary_iou: {results[split]['mean_boundary_iou']:.6f}" in table
        iou, boundary_iou = (results[split][name]["dark"] for name in ("iou", "boundary_iou"))
        assert f"class #0 : {iou:.5f}  {boundary_iou:.5f}  dark" in table
        assert 0 < boundary_iou <= 1 and boundary_iou != iou
        labels = (np.array(Image.open(path)) for path in (folder / split / "seg").iterdir())
        assert np.sum(results[split]["confusion"]) == sum((label != 255).sum() for label in labels)


def test_a_stage_without_epochs_is_left_out_and_said_so(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    assert small_run.main([*arguments(folder, tmp_path / "run"), "--epochs", "0", "2", "--boundary-iou"]) == 0
    out = capsys.readouterr().out
    check_boundary_iou(folder, out, json.loads((tmp_path / "run" / "results.json").read_text()))
    assert "stage 1: left out (0 epochs)" in out and "stage 2 added" not in out
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert "training_stage_2.png" in figures and "training_stage_1.png" not in figures


def test_a_difference_too_small_to_print_has_no_minus_sign():
    before, after = np.diag([10**6, 10**6]), np.array([[10**6, 0], [1, 10**6]])
    assert "added +0.0000 to" in stage_difference(before, after, ("sky", "road"))
    assert "-0.0" not in stage_difference(before, after, ("sky", "road"))
    # IoU 0.5 of the one, and 0.5 of the other.
    assert "added -0.5000 to" in stage_difference(before, np.array([[2, 1], [1, 2]]), ("sky", "road"))


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert str(tmp_path / "nowhere") in fails(capsys, arguments(tmp_path / "nowhere", tmp_path / "run"))


def test_a_bad_image_is_named_before_training(folder, tmp_path, capsys):
    bad = folder / "val" / "img" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert str(bad) in fails(capsys, arguments(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_named(folder, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"not a checkpoint")
    assert str(weights) in fails(capsys, [*arguments(folder, tmp_path / "run"), "--weights", str(weights)])


@pytest.mark.parametrize("scope", ["encoder", "all"])
def test_wrong_weights_are_refused_before_the_images_are_looked_at(folder, tmp_path, capsys, monkeypatch, scope):
    """Which takes minutes: and a bad image would be told of first."""
    (folder / "val" / "img" / "1.jpg").write_bytes(b"bad")
    options = ["--weights", str(tmp_path / "absent"), "--weights-scope", scope]
    assert str(tmp_path / "absent") in fails(capsys, [*arguments(folder, tmp_path / "run"), *options])
    monkeypatch.setattr(shapes, "open_shapes", lambda *_: pytest.fail("the pictures are rendered"))
    assert str(tmp_path / "absent") in fails(capsys, ["--workdir", str(tmp_path / "run"), *options])


def test_weights_of_another_encoder_are_answered_with_its_name(folder, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    save_torch(jax.tree.map(np.zeros_like, small_model()), weights)
    options = ["--weights", str(weights), "--encoder", "resnet50"]
    assert "use --encoder resnet18" in fails(capsys, [*arguments(folder, tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


def test_without_network_imagenet_is_told_what_to_do(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(load_encoder.__kwdefaults__, "base_url", "http://127.0.0.1:9/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    line = fails(capsys, [*arguments(folder, tmp_path / "run"), "--weights", "imagenet", "--encoder", "resnet101"])
    assert "resnet101-63fe2227.pth" in line and str(tmp_path / "cache" / "jaxseg") in line and "--weights PATH" in line


def small_model():
    """The variables of a ResNet-18, all 0.5."""
    flat = {path: np.full(shape, 0.5, np.float32) for path, shape in encoder_shapes("resnet18").items()}
    return traverse_util.unflatten_dict(flat)


def frequencies(folder):
    """The logarithms of the two classes' shares of the training labels, one pixel added to each."""
    labels = [np.array(Image.open(path)) for path in (folder / "train" / "seg").iterdir()]
    counts = np.array([sum((label == k).sum() for label in labels) + 1 for k in range(2)])
    return np.log(counts / counts.sum())


@pytest.mark.parametrize("start", ["prior", "he"])
def test_a_decoder_starts_at_the_training_labels_frequencies_if_it_is_to(folder, tmp_path, monkeypatch, start):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    argv = [*arguments(folder, tmp_path / "run"), "--weights", "none", "--decoder-init", start]
    params = prepare(parse("improved", "", argv), small_run.make_decoder).variables["params"]
    expected = frequencies(folder) if start == "prior" else np.zeros(2)
    np.testing.assert_allclose(params["decoder"]["head"]["bias"], expected, rtol=1e-5)
    assert np.abs(frequencies(folder)).min() > 0.1 and np.asarray(params["encoder"]["Conv_0"]["kernel"]).std() > 0


def test_a_run_goes_on_from_another_runs_encoder_or_from_all_of_it(folder, tmp_path, capsys):
    options = ["--weights", str(tmp_path / "old"), "--decoder-init", "prior"]
    decoder = jax.eval_shape(BaselineDecoder(2).init, jax.random.key(0), jnp.zeros((1, 1, 1, 512)))["params"]
    encoder = small_model()
    params = {
        "encoder": encoder["params"],
        "decoder": jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), decoder),
    }
    state = TrainState(np.array(1), params, {"encoder": encoder["batch_stats"]}, {})
    with checkpoint.open_checkpoints(tmp_path / "old" / "checkpoints") as manager:
        checkpoint.save(manager, state, 0.5, {})
    for scope, kept in (("encoder", False), ("all", True)):
        argv = [*arguments(folder, tmp_path / "new"), *options, "--weights-scope", scope]
        prepared = prepare(parse("baseline", "", argv), lambda number, _: BaselineDecoder(number)).variables
        jax.tree.map(np.testing.assert_array_equal, prepared["params"]["encoder"], encoder["params"])
        jax.tree.map(np.testing.assert_array_equal, prepared["batch_stats"]["encoder"], encoder["batch_stats"])
        ones = [bool(np.all(leaf == 1)) for leaf in jax.tree.leaves(prepared["params"]["decoder"])]
        assert all(ones) if kept else not any(ones)
        if not kept:
            np.testing.assert_allclose(prepared["params"]["decoder"]["head"]["bias"], frequencies(folder), rtol=1e-5)
    (folder / "classes.txt").write_text("dark\nbright\nother\n")
    assert "as many classes" in fails(capsys, argv)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "cityscapes"], "cityscapes"),
        (["--dataset", "shapes:x"], "shapes:x"),
        (["--dataset", os.curdir], "folder:."),
        (["--dataset", "folder"], "folder:DIR"),
        (["--dataset", "folder:", "--weights", "none"], "folder:DIR"),
        (["--dataset", "folder:x"], "--weights"),
        (["--batch-size", "0"], "--batch-size"),
        (["--image-size", "0", "32"], "--image-size"),
        (["--image-size", "32", "16385"], "--image-size"),
        (["--weights", ""], "--weights is missing"),
        (["--learning-rate", "1e-3", "-1"], "--learning-rate"),
        (["--epochs", "0", "0"], "--epochs"),
        (["--learning-rate", "inf", "1e-3"], "--learning-rate"),
        (["--num-classes", "5"], "--num-classes is for folders"),
        (["--dataset", "folder:x", "--weights", "none", "--num-classes", "1"], "--num-classes"),
        (["--seed", "-1"], "--seed"),
        (["--encoder-rate", "0"], "--encoder-rate"),
        (["--adam-b2", "1"], "--adam-b2"),
        (["--seed", str(2**31)], "--seed"),
        (["--workdir", __file__], "is a file"),
        (["--workdir", __file__ + "/run"], "is a file"),
        (["--dropout", "0", "0.2"], "--dropout is for the improved model"),
        (["--max-degrees", "200"], "--max-degrees"),
        (["--jitter", "0.4", "0.4", "-1", "0"], "--jitter"),
        (["--jitter", "0", "0", "0", "0.6"], "--jitter"),
        (["--scale-range", "2", "1"], "--scale-range"),
        (["--scale-range", "0", "1"], "--scale-range"),
        (["--save-minutes", "0"], "--save-minutes"),
        (["--weights-scope", "all"], "--weights none has no decoder"),
        (["--weights-scope", "all", "--weights", "imagenet"], "--weights imagenet has no decoder"),
    ],
)
def test_values_out_of_range_are_refused_at_once(capsys, options, said):
    assert said in fails(capsys, options)


@pytest.mark.parametrize("locked", [".", "run", "run/checkpoints", "run/figures"])
def test_a_workdir_that_is_read_only_is_named_before_the_images_are_looked_at(tmp_path, capsys, monkeypatch, locked):
    monkeypatch.setattr(preparing, "find_data", lambda _: pytest.fail("the images are looked at"))
    monkeypatch.chdir(tmp_path)
    os.makedirs(locked, exist_ok=True)
    os.chmod(locked, 0o500)
    if os.geteuid() == 0:  # who may write everywhere, but to a disk that is read-only
        monkeypatch.setattr(os, "access", lambda path, asked: asked & ~(os.stat(path).st_mode >> 6) == 0)
    try:
        said = fails(capsys, ["--workdir", "run" if locked != "." else "runs/new"])
    finally:
        os.chmod(locked, 0o700)
    assert f"you may not write to {pathlib.Path(locked).absolute() if locked == '.' else locked}" in said


def test_a_batch_that_the_devices_do_not_divide(folder, tmp_path, capsys):
    assert "use 4" in fails(capsys, [*arguments(folder, tmp_path / "run"), "--batch-size", "3"])


def test_a_batch_larger_than_the_split(folder, tmp_path, capsys):
    assert "--batch-size 8" in fails(capsys, [*arguments(folder, tmp_path / "run"), "--batch-size", "16"])


def test_what_is_not_given_comes_from_the_recipe_of_the_data_set():
    settings = complete(Options(batch_size=4), "baseline")
    assert settings.batch_size == 4
    assert settings.image_size == (96, 128) and settings.weights == "none"
    assert settings.workdir.parts[0] == "runs" and settings.workdir.name.startswith("baseline-shapes-")
    report = complete(Options(dataset="folder:some/street scenes", weights="none"), "baseline")
    assert report.image_size == (352, 448)
    assert report.workdir.name.startswith("baseline-street scenes-")


def test_a_pretrained_encoder_under_batch_norm_learns_slower_than_its_decoder():
    def rates(dataset, name):
        settings = complete(Options(dataset=dataset, weights="none"), name)
        return settings.learning_rate[1], settings.encoder_rate

    assert rates("folder:a", "improved") == rates("camvid", "ablation") == (1e-2, 0.1)
    # It has an angle where the improved model has none: without one it could not be begun.
    assert complete(Options(dataset="camvid", weights="none"), "ablation").max_degrees == 10
    assert {rates("shapes", "improved")[1], rates("voc9", "end_to_end")[1], rates("voc9", "baseline")[1]} == {1.0}


def test_the_tables_say_what_is_not_usual_about_the_training():
    def said(dataset):
        return describe_schedule(complete(Options(dataset=dataset, weights="none"), "improved"))

    assert said("shapes") == "cosine"
    assert said("camvid") == "cosine, the encoder's in stage 2 0.1 of it, class weights sqrt in the loss"


def test_the_encoders_rate_reaches_the_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    params = []
    for rate in ("1", "0.1"):
        options = ["--schedule", "constant", "--encoder-rate", rate, "--epochs", "0", "1", "--batch-size", "8"]
        options += ["--learning-rate", "1e-3", "1e-3", "--max-degrees", "0"]
        assert small_run.main([*arguments(folder, tmp_path / rate), *options]) == 0
        params.append(small_run.last_state(tmp_path / rate).params)
    assert "learning rate 0.001, the encoder's 0.0001" in capsys.readouterr().out
    # After one update, from the same start: Adam's first step is as long as the rate, whatever the gradient.
    apart = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), *params)
    np.testing.assert_allclose(max(jax.tree.leaves(apart["encoder"])), 0.9e-3, rtol=1e-3)
    assert max(jax.tree.leaves(apart["decoder"])) < 1e-6


@pytest.mark.parametrize("rule", ["none", "median", "sqrt"])
def test_the_weights_of_the_classes_come_from_the_training_labels(folder, tmp_path, monkeypatch, capsys, rule):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    settings = parse("improved", "", [*arguments(folder, tmp_path / "run"), "--class-weights", rule])
    stages = prepare(settings, small_run.make_decoder).stages
    labels = [np.array(Image.open(path)) for path in (folder / "train" / "seg").iterdir()]
    # Every image shows both classes: the median of the two frequencies is 0.5.
    shares = np.array([sum((label == k).sum() for label in labels) for k in range(2)])
    weights = {"none": None, "median": 0.5 * shares.sum() / shares, "sqrt": np.sqrt(0.5 * shares.sum() / shares)}[rule]
    said = capsys.readouterr().out
    if weights is None:
        assert stages[1].class_weights is stages[2].class_weights is None and "--class-weights" not in said
        return
    np.testing.assert_allclose([stages[1].class_weights, stages[2].class_weights], [weights, weights])
    assert f"(--class-weights {rule}): dark {weights[0]:.3g}, bright {weights[1]:.3g}\n" in said


@pytest.mark.parametrize("number", [1, 16, 17, 70])
def test_the_pixels_of_each_label_are_counted_in_order(number):
    labels = [np.full((2, index + 1), index % 5, np.uint8) for index in range(number)]
    source = type("Source", (), {"label": lambda _, index: labels[index], "__len__": lambda _: number})()
    expected = [[2 * (index + 1) * (index % 5 == k) for k in range(4)] for index in range(number)]
    np.testing.assert_array_equal(preparing.count_classes(source, 4), expected)


def test_a_class_that_no_label_shows_weighs_one():
    counts = np.array([[30, 10, 0], [40, 0, 0]])
    # Of the pixels of the images that show it the first class has 70 of 80, the second 10 of 40; their median 0.5625.
    np.testing.assert_allclose(preparing.weigh_classes(counts, "median"), (0.5625 / 0.875, 0.5625 / 0.25, 1.0))
    np.testing.assert_allclose(preparing.weigh_classes(counts, "sqrt"), (np.sqrt(0.5625 / 0.875), 1.5, 1.0))


def test_quick_is_seen_in_the_settings_and_yields_to_options_that_are_given(tmp_path, capsys):
    quick = complete(Options(quick=True), "improved")
    assert (quick.dataset, quick.image_size, quick.epochs) == ("shapes:small", (64, 96), (1, 2))
    usual = complete(Options(), "improved")
    # All that makes the experiment what it is stays.
    for name in ("max_degrees", "dropout", "learning_rate", "schedule", "encoder", "encoder_rate"):
        assert getattr(quick, name) == getattr(usual, name)
    given = complete(Options(quick=True, dataset="folder:a", weights="none", epochs=(0, 5), batch_size=2), "baseline")
    assert (given.dataset, given.epochs, given.batch_size, given.image_size) == ("folder:a", (0, 5), 2, (64, 96))
    (tmp_path / "config.json").write_text(json.dumps({"settings": to_json(quick)}))
    assert baseline.main(["--workdir", str(tmp_path)]) == 2
    assert "--quick True there, False here" in capsys.readouterr().err


def test_a_run_from_before_an_option_goes_on_at_the_options_default():
    settings = complete(Options(), "baseline")
    new = {"eval_size", "augment", "scale_range", "flip", "jitter", "encoder_rate", "class_weights"}
    there = {name: value for name, value in json.loads(json.dumps(to_json(settings))).items() if name not in new}
    assert differences(there, to_json(settings)) == []
    changed = {"flip": True, "jitter": (0.1, 0.0, 0.0, 0.0), "encoder_rate": 0.1, "class_weights": "sqrt"}
    here = to_json(dataclasses.replace(settings, **changed))
    assert differences(there, here) == [
        "--class-weights none there, sqrt here",
        "--encoder-rate 1.0 there, 0.1 here",
        "--flip False there, True here",
        "--jitter [0.0, 0.0, 0.0, 0.0] there, [0.1, 0.0, 0.0, 0.0] here",
    ]


def test_help_explains_every_option_without_loading_jax():
    code = (
        "import sys; from experiments.baseline import main\ntry: main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert out.strip().endswith("False")
    words = " ".join(out.split())
    explained = words.partition(" options ")[2]
    for field in dataclasses.fields(Options):
        option = f"--{field.name.replace('_', '-')}"
        text = re.split(rf"{option}[ ,]", explained, maxsplit=1)[1]
        assert len(text.partition("(default")[0]) > 40, option
    # What a data set's recipe says is in it, too.
    assert "shapes: --image-size 96 128 --batch-size 8 --epochs 1 9" in words
    assert "quick: --image-size 64 96" in words
    assert "folder: --image-size 352 448" in words


def test_batch_norm_is_synchronised_in_both_models(folder, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("experiments.run.run", lambda settings, make_decoder: started.append((settings, make_decoder)))
    baseline.main(arguments(folder, tmp_path / "run"))
    improved.main(arguments(folder, tmp_path / "run"))
    assert started[1][1](2, 0.1).axis_name == AXIS
    # Only the model is looked at.
    monkeypatch.setattr("experiments.prepare.initialise", lambda *_: {"params": {"decoder": {}}})
    monkeypatch.setattr("experiments.prepare.start_at_prior", lambda *_: {})
    for settings, make_decoder in started:
        assert prepare(settings, make_decoder).make_model(0.1).encoder.axis_name == AXIS


def test_masks_of_0_and_255_are_warned_of(folder, tmp_path, capsys):
    for path in (folder / "train" / "seg").iterdir():
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label == 1, 255, label)).save(path)
    settings = parse("baseline", "", arguments(folder, tmp_path / "run"))
    find_data(settings)[1]()
    said = capsys.readouterr().err
    assert "no label of the training split shows bright" in said and "save a mask's 255 as 1" in said
    for path in (folder / "val" / "seg").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    with pytest.raises(ValueError, match="every pixel of the val labels is 255"):
        find_data(settings)[1]()


@pytest.fixture
def executed(monkeypatch, folder, tmp_path):
    """Runs the command with a function in the place of its training; returns the exit code."""

    def run_with(execute):
        monkeypatch.setattr("experiments.run.execute", execute)
        monkeypatch.setattr("experiments.run.prepare_in_turn", lambda _, settings, *__: settings)
        monkeypatch.setattr("experiments.run.describe_run", lambda settings: {"settings": to_json(settings)})
        return baseline.main(arguments(folder, tmp_path / "run"))

    return run_with


def test_too_little_memory_is_said_in_one_line(executed, capsys):
    def execute(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    assert executed(execute) == 1
    said = capsys.readouterr().err.strip()
    assert "give a smaller --batch-size" in said and "\n" not in said


def test_an_image_that_breaks_while_training_is_named(executed, folder, capsys):
    broken = folder / "train" / "img" / "3.jpg"
    batches = loader.train_batches(open_folder(folder)[1]["train"], image_size=(32, 32), batch_size=4, seed=0)

    def execute(*_):
        broken.write_bytes(broken.read_bytes()[:500])
        for _ in batches:
            pass

    assert executed(execute) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {broken}: cannot be read (") and "\n" not in said


def test_a_defect_of_ours_is_not_called_a_mistake_of_the_user(executed):
    def execute(*_):
        raise ValueError("shapes do not agree")

    with pytest.raises(ValueError, match="shapes do not agree"):
        executed(execute)


def test_a_platform_that_is_not_there_is_said_in_one_line(folder, tmp_path):
    command = [sys.executable, "-m", "experiments.baseline", *arguments(folder, tmp_path / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: JAX finds no device of JAX_PLATFORMS=nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_read_by_head_is_no_error(folder, tmp_path):
    command = [sys.executable, "-m", "experiments.improved", *arguments(folder, tmp_path / "run"), "--summary"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert "Broken pipe" not in said and "Traceback" not in said and process.returncode in (0, 1)


def test_images_that_fill_no_batch_are_told_of_and_missing_letters_in_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)
    (folder / "classes.txt").write_text("dark\n日本\n")
    options = ["--batch-size", "3", "--epochs", "0", "1"]
    monkeypatch.setattr("jaxseg.train.all_devices", lambda: jax.devices()[:1])
    assert small_run.main([*arguments(folder, tmp_path / "run"), *options]) == 0
    out, err = capsys.readouterr()
    assert "each epoch trains on 6 of the 8 images, batches of 3" in out
    assert "the figures' font lacks letters" in err and "Glyph" not in err


def test_a_run_that_saved_nothing_is_not_said_to_go_on(tmp_path):
    assert "begins anew" in how_to_go_on(ALONE, tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert f"--workdir {tmp_path} goes on" in how_to_go_on(ALONE, tmp_path)


def test_a_process_that_may_not_see_the_workdir_says_nothing_of_what_is_in_it(tmp_path):
    second = Processes(1, 2)
    assert "begins anew" not in how_to_go_on(second, tmp_path)
    assert "nothing was saved" in what_is_kept(ALONE, tmp_path) and "nothing" not in what_is_kept(second, tmp_path)


def test_a_run_of_another_decoder_differs_and_an_older_one_that_does_not_say_does_not():
    run = {"settings": {"seed": 0}, "names": ["a", "b"]}
    assert differ(run, {**run, "decoder": "BaselineDecoder"}) == []
    found = differ({**run, "decoder": "BaselineDecoder"}, {**run, "decoder": "ImprovedDecoder"})
    assert found == ["decoder BaselineDecoder there, ImprovedDecoder here"]


def test_a_run_goes_on_only_with_the_same_weights_of_the_classes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ResNet", small_run.SmallEncoder)

    def meta(rule):
        settings = parse("improved", "", [*arguments(folder, tmp_path / "run"), "--class-weights", rule])
        return json.loads(json.dumps(describe_run(prepare(settings, small_run.make_decoder))))

    there, without = meta("sqrt"), meta("none")
    path = folder / "train" / "seg" / "0.png"
    label = np.array(Image.open(path))
    label[:20] = 0
    Image.fromarray(label).save(path)
    found = differ(there, meta("sqrt"))
    assert len(found) == 1 and found[0].startswith(f"class_weights {there['class_weights']} there, [")
    older = {name: value for name, value in without.items() if name != "class_weights"}
    assert differ(older, without) == []
