"""The report: one file that opens anywhere, with what the runs left and nothing that they could smuggle in."""

import csv
import html.parser
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import ablation, end_to_end, filtering, settings
from experiments.commands import to_command
from experiments.markup import Html, element, table
from experiments.report import main
from experiments.sections import OWN_IOU, OWN_MEAN_IOU
from experiments.settings import Options, complete, to_json
from jaxseg import metrics
from jaxseg.data.labels import VOC9

EVIL = "<script>alert('\"&amp;')</script>"
VOID = {"meta", "img"}


class Reader(html.parser.HTMLParser):
    """Reads a page, and makes sure that what is opened is closed; keeps the texts, the tables' cells, the elements."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def pictures(self):
        return [attributes for tag, attributes in self.elements if tag == "img"]


def draw(path, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def results_of(confusion, names):
    """As results.json has a split."""
    iou = metrics.iou_per_class(confusion)
    by_name = {name: None if np.isnan(x) else x for name, x in zip(names, iou.tolist(), strict=True)}
    return {"mean_iou": metrics.mean_iou(confusion), "iou": by_name, "confusion": confusion.tolist()}


def make_run(
    folder, experiment="baseline", dataset="shapes", names=("sky", "road", "car"), splits=("val", "test"), **more
):
    """What a run leaves; returns its folder."""
    options = complete(Options(dataset=dataset, weights="none", workdir=folder, **more), experiment)
    decoder = {"baseline": "BaselineDecoder", "improved": "ImprovedDecoder"}[experiment]
    colours = [[10 * index, 0, 255] for index in range(len(names))]
    config = {"settings": to_json(options), "decoder": decoder, "names": names, "colours": colours}
    config["images"] = {"train": 40, **dict.fromkeys(splits, 20)}
    for name in ("architecture", "confusion", "results_1", "results_2", "training_stage_1", "training_stage_2"):
        draw(folder / "figures" / f"{name}.png")
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(len(experiment))
    results = {"checkpoint": {"stage": "stage 2: everything", "epoch": 2}}
    for split in splits:
        confusion = rng.integers(1, 100, (len(names), len(names)))
        confusion[0, 0], confusion[-1, -1] = 1000, 0
        results[split] = results_of(confusion, names)
    (folder / "results.json").write_text(json.dumps(results))
    with open(folder / "metrics.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["kind", "stage", "epoch", "step", "loss", "learning_rate", "mean_iou", "seconds"])
        for stage, epoch, score in ((1, 1, 0.25), (2, 1, 0.5), (2, 2, 0.75)):
            rows.writerows([["step", stage, epoch, 10 * stage + epoch, 1.5, 1e-3, "", ""]])
            rows.writerows([["epoch", stage, epoch, 10 * stage + epoch, 1.5, "", score, 3]])
    return folder


def report(*folders, output):
    """The report of these folders, read."""
    assert main([*map(str, folders), "--output", str(output)]) == 0
    return Reader(output.read_text(encoding="utf-8"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "where" / "report.html"


def make_series(folder, kind, rows, **settings):
    folder.mkdir()
    common = {**to_json(complete(Options(), "improved")), **settings}
    for name in ("seed", "workdir", *(ablation.VARIES if kind == "ablation" else ("learning_rate",))):
        del common[name]
    record = {"experiment": kind, "settings": common, "rows": rows, "unfinished": ["the-last-seed-3"]}
    (folder / f"{kind}.json").write_text(json.dumps(record))
    (folder / f"{kind}.md").write_text("The budget.\n\n| a | b |\n")
    return folder


def make_ablation(folder):
    split = {"mean_iou": 0.5, "iou": {}}
    rows = []
    for seed in (0, 3):
        for part in ablation.PARTS[:4]:
            values = {"max_degrees": 30.0, "dropout": [0.0, 0.2], "epochs": [1, 9]}
            row = {
                "name": part.name,
                "title": part.title,
                "seed": seed,
                "settings": values,
                "run": "x",
                "diverged": None,
            }
            split = {"mean_iou": split["mean_iou"] + 0.01, "iou": {}}
            rows.append({**row, "val": split, "test": None, "checkpoint": {}})
    draw(make_series(folder, "ablation", rows) / "figures" / "ablation.png")
    return folder


def make_end_to_end(folder):
    rows = []
    for rate in (1e-2, 1e-3):
        row = {"name": f"learning-rate-{rate}", "title": f"learning rate {rate:g}", "seed": 5, "run": f"rate-{rate}"}
        row |= {"settings": {"learning_rate": [rate, rate]}, "diverged": {"step": 17} if rate > 5e-3 else None}
        score = None if row["diverged"] else {"mean_iou": 0.25, "iou": {}}
        rows.append({**row, "val": score, "test": None, "checkpoint": {"epoch": 2}})
    make_series(folder, "end_to_end", rows, epochs=[0, 10])
    for row in rows:
        make_run(folder / row["run"])
    for name in end_to_end.FIGURES.values():
        draw(folder / name)
    return folder


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """What a filtering leaves."""
    folder = tmp_path_factory.mktemp("filtering") / "blur"
    assert filtering.main(["--output", str(folder), "--sigma", "0.9", "--more-sigmas"]) == 0
    return folder


def make_comparison(folder):
    for name in ("classes.png", "a_better_1.png", "b_better_1.png"):
        draw(folder / name)
    record = {letter: {"title": f"{letter}: {name}"} for letter, name in (("A", "one"), ("B", "two"))}
    values = {"run_a": "runs/one", "run_b": "runs/two", "split": "test", "images": 4, "data_dir": None, "output": "x"}
    (folder / "comparison.json").write_text(json.dumps({**record, "of": "somewhere", "settings": values}))
    return folder


def test_everything_is_there_in_the_original_reports_order_with_the_commands(tmp_path, output, filtered, capsys):
    baseline, improved = make_run(tmp_path / "base"), make_run(tmp_path / "better", "improved")
    others = [filtered, make_ablation(tmp_path / "parts"), make_end_to_end(tmp_path / "ends")]
    page = report(*others, make_comparison(tmp_path / "sides"), improved, baseline, output=output)
    headings = re.findall(r"<h2 id=\"\w+\">\d (.*?)</h2>", output.read_text())
    assert headings == [
        "Runs", "Preprocessing", "Model architecture", "Training", "Results", "IoU of each class",
        "Improved against baseline", "What each part buys", "Image filtering",
    ]  # fmt: skip
    assert all(f"#{attributes['id']}" in output.read_text() for tag, attributes in page.elements if tag == "h2")
    for command in (
        f"python -m experiments.baseline --weights none --workdir {baseline}",
        f"python -m experiments.improved --weights none --workdir {improved}",
        f"python -m experiments.ablation --weights none --workdir {tmp_path / 'parts'} --seeds 0 3",
        f"python -m experiments.end_to_end --weights none --epochs 0 10 --seed 5 --workdir {tmp_path / 'ends'}"
        " --learning-rates 0.01 0.001",
        f"python -m experiments.compare runs/one runs/two --split test --output {tmp_path / 'sides'}",
        f"python -m experiments.filtering --sigma 0.9 --more-sigmas --output {filtered}",
    ):
        assert command in page.text
    assert "The budget." in page.text and "Not over yet: the-last-seed-3." in page.text
    assert ["learning rate 0.01", "", "", "1.5000", "diverged at step 17"] in page.rows
    assert ["+ batch norm", "baseline", "0.5400 ± 0.0283", "+0.0100 ± 0.0000"] in page.rows
    assert "A Gaussian blur replaces each pixel" in page.text
    # Six of each run, two of end to end, one ablation, three comparisons, three filterings.
    assert len(page.pictures()) == 2 * 6 + 2 + 1 + 3 + 3
    assert str(output) in capsys.readouterr().out


def test_the_numbers_are_those_of_the_runs(tmp_path, output):
    runs = [make_run(tmp_path / "base"), make_run(tmp_path / "better", "improved")]
    page = report(*runs, output=output)
    base, better = (json.loads((run / "results.json").read_text()) for run in runs)
    for split in ("val", "test"):
        for index, name in enumerate(("sky", "road", "car")):
            row = [f"{index} {name}", *(f"{each[split]['iou'][name]:.5f}" for each in (base, better))]
            gain = better[split]["iou"][name] - base[split]["iou"][name]
            assert row in page.rows and [*row, f"{gain:+z.5f}".replace("-", "\u2212")] in page.rows
        means = [f"{each[split]['mean_iou']:.6f}" for each in (base, better)]
        assert ["mean", *means] in page.rows
    scores = [f"{base[split]['mean_iou']:.6f}" for split in ("val", "test")]
    assert ["base", "baseline", "shapes", "stage 2: everything, epoch 2", *scores] in page.rows
    assert ["1: encoder frozen", "1", "0.001", "8", "0", "0.250000", "1"] in page.rows
    assert ["2: everything", "9", "0.001", "8", "0.2", "0.750000", "2"] in page.rows
    assert "base: best: sky" in page.text and "worst: car (0.000)" in page.text
    marked = [attributes["class"] for tag, attributes in page.elements if tag == "span" and "style" not in attributes]
    assert marked == ["best", "best", "worst", "worst"] * 2


def test_beside_runs_on_the_reports_data_stand_its_own_numbers(tmp_path, output):
    runs = [make_run(tmp_path / name, name, "voc9", VOC9.names) for name in ("baseline", "improved")]
    page = report(*runs, output=output)
    rows = [row for row in page.rows if row[0] == "4 tv/monitor"]
    assert rows[0][2::2] == ["0.38764", "0.43750"] and rows[2][-1] == "+0.04986"
    (means, *_) = [row for row in page.rows if row[0] == "mean"]
    assert means[2::2] == ["0.682180", "0.689432"]
    assert ["training images", "40", "40", "5460"] in page.rows
    # What is in the tables of the test split: the report gives nothing for it.
    assert len(rows[1]) == 3 and "2019 report" not in report(make_run(tmp_path / "x"), output=output).text


def test_the_reports_own_numbers_agree_with_themselves():
    for experiment, values in OWN_IOU.items():
        assert np.mean(values) == pytest.approx(OWN_MEAN_IOU[experiment], abs=5e-6)


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path, output):
    (tmp_path / EVIL.replace("/", "")).mkdir()
    run = make_run(
        tmp_path / EVIL.replace("/", "") / "run", dataset=f"folder:{tmp_path}/{EVIL}", names=("a", "b", EVIL)
    )
    for name in ("base", "run"):
        make_run(tmp_path / name, names=(EVIL, "b", "c"))
    make_run(tmp_path / "diverged")
    (tmp_path / "diverged" / "results.json").unlink()
    (tmp_path / "diverged" / "diverged.json").write_text(json.dumps({"step": 3, "message": EVIL}))
    draw(tmp_path / "run" / "figures" / "results_3.png", (1200, 1200))
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8))
    big.save(tmp_path / "base" / "figures" / "results_1.png")
    page = report(run, tmp_path / "base", tmp_path / "run", tmp_path / "diverged", output=output)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "base", "svg"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action"):
            assert name not in attributes or re.match(r"data:image/(png|webp);base64,[\w+/=]+$|#\w+$", attributes[name])
    assert "http" not in re.sub(r'"data:[^"]*"', "", output.read_text()).replace("http-equiv", "")
    assert "default-src 'none'" in output.read_text()
    assert page.text.count(EVIL) > 4 and f"It diverged at update 3: {EVIL}" in page.text
    kinds = [attributes["src"][:15] for attributes in page.pictures()]
    assert kinds.count("data:image/webp") == 1
    # Two folders of the same name are told apart.
    assert sum(row[0] == str(run) for row in page.rows) == 1


def test_what_is_missing_is_left_out(tmp_path, output, filtered, capsys):
    run = make_run(tmp_path / "run", splits=("val",))
    assert "test mIoU" not in report(run, output=output).text
    for name in ("results.json", "metrics.csv"):
        (run / name).unlink()
    for figure in (run / "figures").iterdir():
        figure.unlink()
    page = report(run, output=output)
    assert "It is not over." in page.text and "Training" not in page.text and not page.pictures()
    assert "it is not over" in capsys.readouterr().out
    old = json.loads((run / "config.json").read_text())
    del old["decoder"], old["settings"]["eval_size"], old["settings"]["dropout"]
    (run / "config.json").write_text(json.dumps(old))
    assert "did not write down the command" in report(run, output=output).text
    blur = shutil.copytree(filtered, tmp_path / "blur")
    (blur / filtering.RECORD).unlink()
    page = report(blur, output=output)
    assert re.findall(r"\d Image filtering", page.text) and len(page.pictures()) == 3 and "Runs" not in page.text


def test_a_mistake_is_one_line(tmp_path, output, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        ([], "name at least one RUN"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "no run"),
    ]
    damages = {
        "config.json": ["{", "[]", '{"settings": {}}', '{"settings": 5, "names": [], "colours": [], "images": {}}'],
        "results.json": ["\x00", "{}", '{"checkpoint": {"stage": "s", "epoch": 1}, "val": {"mean_iou": "x"}}'],
        "metrics.csv": ["kind,stage\nstep,1\n", "kind,stage,epoch,step,loss,mean_iou\nstep,1,1,1,x,\n"],
        "figures/results_1.png": ["no picture"],
        "diverged.json": ["{}"],
    }
    for name, contents in damages.items():
        for number, content in enumerate(contents):
            run = make_run(tmp_path / f"{name.replace('/', '-')}-{number}")
            (run / name).write_text(content)
            if name == "diverged.json":
                (run / "results.json").unlink()
            cases.append(([run], f"{run / name}"))
    for kind in ("ablation", "end_to_end", "comparison", "filtering"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / f"{kind}.json").write_text("{}")
        cases.append(([folder], f"{folder / kind}.json is damaged"))
    for folders, message in cases:
        assert main([*map(str, folders), "--output", str(output)]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not output.exists()
    assert main([str(make_run(tmp_path / "good")), "--output", str(tmp_path)]) == 2
    assert "is a folder: name a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--quick --seed 3 --no-cache-features --boundary-iou",
        "--dataset 'folder:a folder/it'\\''s' --weights imagenet --num-classes 5 --image-size 64 96 --dtype bfloat16",
        "--dataset voc9 --weights none --learning-rate 1e-05 0.5 --epochs 0 3 --max-degrees 1.5 --workdir 'x y'",
        "--batch-size 16 --flip --jitter 0.4 0.4 0.4 0.1 --save-minutes 3 --encoder resnet50",
    ],
)
@pytest.mark.parametrize("experiment", ["baseline", "improved"])
def test_the_command_gives_the_settings_back(experiment, argv):
    given = settings.parse(experiment, "", shlex.split(argv))
    written = json.loads(json.dumps(to_json(given)))
    words = shlex.split(to_command(experiment, written))
    assert words[:3] == ["python", "-m", f"experiments.{experiment}"]
    again = to_json(settings.parse(experiment, "", words[3:]))
    assert {**again, "save_minutes": 0} == {**written, "save_minutes": 0}


def test_the_command_of_a_run_from_before_an_option_gives_what_it_was_then():
    given = settings.parse("improved", "", ["--dataset", "folder:a", "--num-classes", "2", "--weights", "none"])
    written = json.loads(json.dumps(to_json(given)))
    assert written.pop("encoder_rate") == 0.1
    assert "--encoder-rate 1.0" in to_command("improved", written)


def test_the_training_says_what_else_was_unusual(tmp_path, output):
    usual = report(make_run(tmp_path / "usual"), output=output).text
    assert "cosine learning rate." in usual and "Rare classes" not in usual and "the encoder's in" not in usual
    run = make_run(tmp_path / "run", "improved", encoder_rate=0.25, class_weights="sqrt")
    text = report(run, output=tmp_path / "report.html").text
    assert "cosine learning rate, the encoder's in stage 2 0.25 of it. Rare classes weigh more" in text
    assert "(--class-weights sqrt)" in text


def test_a_damaged_encoder_rate_is_the_files_fault(tmp_path, output, capsys):
    config = make_run(tmp_path / "run") / "config.json"
    config.write_text(config.read_text().replace('"encoder_rate": 1.0', '"encoder_rate": "fast"'))
    assert main([str(tmp_path / "run"), "--output", str(output)]) == 2
    assert str(config) in capsys.readouterr().err


def test_text_is_escaped_and_markup_is_not():
    assert element("p", "a<b", Html("<i>"), class_='"') == '<p class="&quot;">a&lt;b<i></p>'
    assert "<td>&amp;</td>" in table(["", ""], [["<", "&"]]) and '<th scope="row">&lt;</th>' in table([""], [["<"]])
