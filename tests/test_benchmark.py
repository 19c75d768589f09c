"""The benchmark: what it counts, and that it measures what it says."""

import json
import mmap
import sys
import time
import types
from typing import ClassVar

import numpy as np
import pytest

from experiments import benchmark, loading, works


@pytest.mark.parametrize(("encoder", "published"), [("resnet18", 1.814), ("resnet50", 4.089)])
def test_the_work_is_counted_as_torchvision_does(encoder, published):
    """Its tables give 10^9 multiplications of an image of 224x224, with the last layer, which is missing here."""
    layers = works.list_layers(works.Load(encoder=encoder, image_size=(224, 224), batch_size=1))
    encoder = sum(layer.gigaflops for layer in layers if layer.name.startswith("encoder"))
    assert abs(encoder / 2 - published) < 0.003


def test_what_trains_counts_three_times():
    load = works.Load(image_size=(64, 96), batch_size=1, num_classes=5)
    inputs = zip((512, 256, 128, 64, 32), (256, 128, 64, 32, 16), strict=True)
    # Each layer doubles 2x3; each output sees 2x2 taps.
    decoder = 2 * sum(4 * i * o * 6 * 4 ** (layer + 1) for layer, (i, o) in enumerate(inputs)) + 2 * 16 * 5 * 64 * 96
    stem = 2 * 7 * 7 * 3 * 64 * 32 * 48
    forward = works.gigaflops("inference", load) * 1e9
    assert works.gigaflops("validation", load) * 1e9 == forward
    np.testing.assert_allclose(works.gigaflops("stage1", load) * 1e9, forward + 2 * decoder)
    np.testing.assert_allclose(works.gigaflops("stage1-cached", load) * 1e9, 3 * decoder)
    np.testing.assert_allclose(works.gigaflops("stage2", load) * 1e9, 3 * forward - stem)


def test_it_measures_and_writes_what_it_measured(tmp_path, capsys):
    options = ["--image-size", "32", "32", "--work", "stage1-cached", "--rounds", "2", "--steps", "1"]
    options += ["--loader"]
    path = tmp_path / "numbers.json"
    assert benchmark.main([*options, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    row = results["work"]["stage1-cached"]["jaxseg"]
    assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["ratio"] == 1
    assert 0 < row["compile_s"] < row["start_s"]
    np.testing.assert_allclose(row["images_per_s"] * row["ms"], 1e3 * 4)
    np.testing.assert_allclose(row["gflops"], row["gflop_per_image"] * row["images_per_s"])
    np.testing.assert_allclose(row["share_of_peak"], row["gflops"] / results["peak_gflops"])
    assert "32x32, batch 4, float32, loader included" in capsys.readouterr().out


class _Program:
    """In a worker's place: its rounds take 0, 1, 4, 9, ... seconds; the class knows who lives, and what was asked."""

    alive: ClassVar[list["_Program"]] = []
    started: ClassVar[list[tuple[str, str]]] = []
    asked: ClassVar[list[tuple[str, str, str]]] = []

    def __init__(self, program, work, settings):
        self.program, self.work = program, work
        self.alive.append(self)
        number = sum(one[1] == work for one in self.started)
        self.machine = {"start_s": number, "compile_s": number / 2, "gflop_per_image": 7.0}
        self.started.append((program, work))

    def ask(self, question):
        question = (self.program, self.work, question)
        number = self.asked.count(question)
        self.asked.append(question)
        return 100 * 2**number if question[2] == "peak" else number**2

    def close(self):
        self.alive.remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def programs(monkeypatch):
    """`_Program` for workers, fresh."""
    for name in ("alive", "started", "asked"):
        monkeypatch.setattr(_Program, name, [])
    monkeypatch.setattr(benchmark, "_Worker", _Program)
    return _Program


def _measure(settings, *works):
    results = {"peak_gflops": 100.0, "work": {}}
    benchmark._measure_works(works, ["jaxseg", "torch eager"], settings, results)
    return results["work"]


def test_the_processor_is_named(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: A Fast One @ 3 GHz\n\nprocessor\t: 1\nmodel name\t: Another\n")
    monkeypatch.setattr(benchmark, "_PROCESSOR", path)
    assert (benchmark._name("cpu"), benchmark._name("NVIDIA H200")) == ("A Fast One @ 3 GHz", "NVIDIA H200")
    path.write_text("processor\t: 0\n")
    assert benchmark._name("cpu") == "cpu"
    path.unlink()
    assert benchmark._name("cpu") == "cpu"


def test_the_times_of_all_starts_are_pooled(programs, tmp_path, capsys):
    """All programs are started four times, the first time not measured, and no work again before the other."""
    settings = benchmark.Settings(starts=3, rounds=2, steps=2, kept_programs=True, profile=tmp_path)
    found = _measure(settings, "stage2", "inference")
    turns = [(program, work) for work in ("stage2", "inference") for program in ("jaxseg", "torch eager")]
    assert programs.started == turns * 4 and not programs.alive
    # 0, 1, 4, 9, 16 and 25 seconds for two steps of four images.
    for work, rows in found.items():
        assert list(rows) == ["jaxseg", "torch eager"]
        for row, start in ((rows["jaxseg"], 4), (rows["torch eager"], 5)):
            assert (row["ms_min"], row["ms"], row["ms_max"]) == (0, 3250, 12500)
            assert (row["start_s"], row["compile_s"]) == (start, start / 2)
            assert (row["peak_mib"], row["gflop_per_image"]) == (200, 7)
            np.testing.assert_allclose(row["images_per_s"], 4 / 3.25)
            assert [one["ms"] for one in row["starts"]] == [[0, 500], [2000, 4500], [8000, 12500]]
        # Once, and when the peak of its start is known.
        of_jaxseg = [question for *whose, question in programs.asked if whose == ["jaxseg", work]]
        assert of_jaxseg == ["round", "round", "peak", "profile", *2 * ["round", "round", "peak"]]
    table = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert table[1:5] == [
        ["stage2", "jaxseg", "1.2"],
        ["stage2", "torch", "eager"],
        ["inference", "jaxseg", "1.2"],
        ["inference", "torch", "eager"],
    ]


def test_features_computed_once_are_measured_without_others(programs):
    found = _measure(benchmark.Settings(starts=2, kept_programs=True), "stage1-cached", "stage2")
    assert ("torch eager", "stage1-cached") not in programs.started
    assert {work: list(rows) for work, rows in found.items()} == {
        "stage1-cached": ["jaxseg"],
        "stage2": ["jaxseg", "torch eager"],
    }


def test_only_what_takes_turns_lives_at_a_time(programs, monkeypatch):
    living, ask = [], programs.ask

    def ask_and_count(self, question):
        living.append(len(programs.alive))
        return ask(self, question)

    monkeypatch.setattr(programs, "ask", ask_and_count)
    settings = benchmark.Settings(starts=2, kept_programs=True)
    _measure(settings, "stage2", "inference")
    assert set(living) == {2} and not programs.alive
    monkeypatch.setattr(programs, "ask", lambda self, question: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _measure(settings, "stage2")
    assert not programs.alive


def test_what_was_measured_before_a_failure_is_printed(programs, monkeypatch, capsys):
    ask = programs.ask

    def fail_at_last(self, question):
        if len(programs.started) == 2 * 2 * 3:
            raise RuntimeError("no memory")
        return ask(self, question)

    monkeypatch.setattr(programs, "ask", fail_at_last)
    with pytest.raises(RuntimeError, match="no memory"):
        _measure(benchmark.Settings(starts=3, rounds=2, steps=2), "stage2", "inference")
    table = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    # All starts of stage 2: 0, 1, 4, 9, 16 and 25 seconds for two steps; of inference the first four.
    assert table[1:-1] == [
        ["stage2", "jaxseg", "1.2", "3250.0", "(0.0-12500.0)"],
        ["stage2", "torch", "eager", "1.2", "3250.0"],
        ["after", "2", "of", "3", "starts:"],
        ["inference", "jaxseg", "3.2", "1250.0", "(0.0-4500.0)"],
        ["inference", "torch", "eager", "3.2", "1250.0"],
    ]


def test_programs_are_kept_and_the_start_that_is_measured_takes_them(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--image-size", "32", "32", "--work", "inference", "--rounds", "1", "--steps", "1"]
    assert benchmark.main([*options, "--kept-programs"]) == 0
    # The program, and when it was last taken from there, in nanoseconds: by a later process.
    program, taken = sorted(tmp_path.glob("jaxseg/compiled/*/*predict*"))
    if program.name.endswith("-atime"):
        program, taken = taken, program
    assert taken.name.endswith("-atime") and program.name.endswith("-cache")
    assert int.from_bytes(taken.read_bytes(), "little") - program.stat().st_mtime_ns > 10**8


@pytest.mark.parametrize("asked", [False, True])
def test_programs_are_kept_only_if_asked_for(monkeypatch, asked):
    """The worker is this process; it is stopped before any work."""
    said, answers = [], []

    def prepare(*_):
        said.append("prepared")
        raise ValueError("enough")

    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(benchmark, "give_back_what_compiling_took", lambda: None)
    monkeypatch.setattr(benchmark, "_keep_programs", lambda: said.append("kept"))
    monkeypatch.setattr(works, "prepare", prepare)
    pipe = types.SimpleNamespace(send=answers.append)
    benchmark._serve(pipe, "jaxseg", "inference", benchmark.Settings(kept_programs=asked))
    assert said == ["kept"] * asked + ["prepared"] and "enough" in str(*answers)


def test_loading_is_measured_in_turns_with_the_steps(monkeypatch, capsys):
    """The step is a pause here: as long for every batch, whoever gives it."""
    taken = []

    def prepare(work, load, batches):
        def work_on(number):
            taken.extend((work, next(batches)["label"]) for _ in range(number))
            time.sleep(0.05 * number)

        return work_on

    monkeypatch.setattr(works, "prepare", prepare)
    load = works.Load(image_size=(32, 40), batch_size=2, num_classes=3)
    rows = loading.measure_loading(load, rounds=2, steps=3)
    assert [(row["work"], row["files"]) for row in rows] == [
        (work, files) for work in ("stage1", "stage2") for files in ("JPEG", "PNG")
    ]
    given = works.make_batch(load)["label"]
    from_files = [not np.array_equal(labels, given) for work, labels in taken if work == "stage1"]
    # One to start with; then in each round two and three that are given, and as many from files.
    assert from_files == [False] + 4 * ([False] * 5 + [True] * 5)
    for row in rows:
        assert 4 < row["step_images_per_s"] <= 40 and row["both_images_per_s"] <= 40
        np.testing.assert_allclose(row["ratio"], row["read_images_per_s"] / row["step_images_per_s"])
        np.testing.assert_allclose(row["kept"], row["both_images_per_s"] / row["step_images_per_s"])
    rows[0] |= {"read_images_per_s": 200.0, "step_images_per_s": 40.0, "both_images_per_s": 38.0}
    benchmark.print_loading([rows[0] | {"ratio": 5.0, "kept": 0.95}])
    assert capsys.readouterr().out.split("\n")[2].split() == ["stage1", "JPEG", "200.0", "40.0", "5.00", "38.0", "95%"]


def test_the_breakdown_has_every_layer_and_sums_them(capsys):
    load = works.Load(model="improved", image_size=(32, 32), batch_size=1)
    names = [layer.name for layer in works.list_layers(load)]
    assert [name for name in names if "layer" not in name and name.startswith("encoder")] == [
        "encoder/conv1",
        "encoder/bn1",
    ]
    # 20 convolutions of the encoder, 5 and the head of the decoder; a batch norm behind each but the head.
    assert len(names) == 20 + 6 + 20 + 5 and len(set(names)) == len(names)
    row = {"name": "conv", "input": [1, 2, 3], "gflop": 0.5, "backward_gflop": 1.0}
    other = {"name": "loss", "input": [4], "gflop": 0.0, "backward_gflop": 0.0, "forward_ms": 1.0, "backward_ms": 2.0}
    benchmark.print_breakdown([row | {"forward_ms": 4.0, "backward_ms": 10.0}, other])
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[1:] == [
        ["conv", "1x2x3", "4.00", "125", "10.00", "100"],
        ["loss", "4", "1.00", "2.00"],
        ["together", "5.00", "100", "12.00", "83"],
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps"),
        (["--starts", "0"], "--starts"),
        (["--work"], "nothing to measure"),
        (["--work", "stage1", "inference", "stage1"], "--work names stage1 twice"),
        (["--against", "torch", "--torch-forms", "bf16", "bf16"], "--torch-forms names bf16 twice"),
        (["--torch-forms", "compile"], "--against torch"),
        (["--image-size", "4", "32"], "8 or more"),
        (["--model", "improved", "--work", "stage1-cached"], "for the baseline"),
        (["--json", "no/such/folder.json"], "no/such"),
        (["--profile", __file__], "is a file"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, options, said):
    assert benchmark.main(options) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line


def test_kept_programs_that_cannot_be_kept_are_told(capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "False")
    assert benchmark.main(["--kept-programs", "--work", "inference"]) == 2
    assert "JAX_ENABLE_COMPILATION_CACHE is off" in capsys.readouterr().err


def test_what_a_program_cannot_do_is_told_too(capsys):
    assert benchmark.main(["--batch-size", "3", "--image-size", "32", "32", "--work", "inference"]) == 2
    assert "error: jaxseg, inference: " in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where a process can forget its peak")
def test_the_peak_is_that_since_it_was_forgotten():
    def touch():
        with mmap.mmap(-1, 2**28) as memory:  # not malloc's, which here keeps what is freed
            memory[:: mmap.PAGESIZE] = bytes(len(range(0, 2**28, mmap.PAGESIZE)))

    touch()
    with_it = benchmark._peak_memory("jaxseg")
    benchmark._forget_peak()
    without = benchmark._peak_memory("jaxseg")
    touch()
    assert with_it - without > 200 and benchmark._peak_memory("jaxseg") - without > 200
