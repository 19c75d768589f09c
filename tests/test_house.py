"""The house keeps its walls: who may import whom."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The modules of jaxseg that each one may import; a module that is not named may import none.
ALLOWED = {
    "jaxseg.augment": {"jaxseg.data.canvases"},
    "jaxseg.convolution": {"jaxseg.cpu", "jaxseg.winograd"},
    "jaxseg.winograd": {"jaxseg.cpu"},
    "jaxseg.layers": {"jaxseg.convolution", "jaxseg.devices", "jaxseg.initializers"},
    "jaxseg.losses": {"jaxseg.devices"},
    "jaxseg.resnet": {"jaxseg.initializers", "jaxseg.layers"},
    "jaxseg.segmenter": {"jaxseg.layers"},
    "jaxseg.misfit": {"jaxseg.resnet"},
    "jaxseg.pretrained": {f"jaxseg.{name}" for name in ("checkpoint", "download", "misfit", "resnet", "torchfile")},
    "jaxseg.torchfile": {"jaxseg.torchpickle"},
    "jaxseg.classify": {f"jaxseg.{name}" for name in ("enlarge", "manner", "tiles", "train")},
    "jaxseg.decoders": {"jaxseg.layers"},
    "jaxseg.boundary": {"jaxseg.metrics"},
    "jaxseg.inference": {
        f"jaxseg.{name}"
        for name in ("checkpoint", "classify", "data.labels", "decoders", "manner", "resnet", "segmenter", "train")
    },
    "jaxseg.export": {"jaxseg.segmenter"},
    "jaxseg.checkpoint": {"jaxseg.files"},
    "jaxseg.download": {"jaxseg.files"},
    "jaxseg.log": {"jaxseg.files"},
    "jaxseg.manner": {"jaxseg.data.canvases", "jaxseg.data.loader"},
    "jaxseg.plots.page": {"jaxseg.files"},
    "jaxseg.train": {
        f"jaxseg.{name}" for name in ("augment", "boundary", "cpu", "devices", "enlarge", "losses", "memory", "metrics")
    },
    "jaxseg.plots.__init__": {
        f"jaxseg.plots.{name}"
        for name in ("architecture", "comparison", "confusion", "contact", "curves", "filtering", "page")
    }
    | {"jaxseg.plots.pictures", "jaxseg.plots.variants"},
    "jaxseg.plots.architecture": {"jaxseg.plots.page"},
    "jaxseg.plots.comparison": {"jaxseg.plots.page"},
    "jaxseg.plots.confusion": {"jaxseg.plots.page"},
    "jaxseg.plots.contact": {"jaxseg.plots.page", "jaxseg.plots.pictures"},
    "jaxseg.plots.curves": {"jaxseg.plots.page"},
    "jaxseg.plots.filtering": {"jaxseg.plots.page"},
    "jaxseg.plots.pictures": {"jaxseg.plots.page"},
    "jaxseg.plots.variants": {"jaxseg.plots.page"},
    "jaxseg.data.images": {"jaxseg.data.labels"},
    "jaxseg.data.checks": {"jaxseg.data.labels", "jaxseg.data.threads"},
    "jaxseg.data.folder": {"jaxseg.data.checks", "jaxseg.data.images", "jaxseg.data.labels"},
    "jaxseg.data.loader": {"jaxseg.data.canvases", "jaxseg.data.labels"},
    "jaxseg.data.archives": {"jaxseg.data.images"},
    "jaxseg.data.matlab": {"jaxseg.data.images"},
    "jaxseg.data.records": {"jaxseg.data.images", "jaxseg.data.labels", "jaxseg.files"},
    "jaxseg.data.pairs": {f"jaxseg.data.{name}" for name in ("images", "records", "threads")},
    "jaxseg.data.shapes": {"jaxseg.data.images", "jaxseg.data.labels", "jaxseg.data.records"},
    "jaxseg.data.prepared": {"jaxseg.data.labels"},
    "jaxseg.data.camvid": {
        "jaxseg.download",
        *(f"jaxseg.data.{name}" for name in ("archives", "images", "labels", "pairs", "records")),
    },
    "jaxseg.data.voc9": {
        "jaxseg.download",
        *(f"jaxseg.data.{name}" for name in ("archives", "images", "labels", "matlab", "pairs", "records")),
    },
}


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, imports(path)


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_arrows_point_one_way():
    names = {name for name, _ in modules("jaxseg")}
    for name, imported in modules("jaxseg"):
        assert (imported & names) - {"jaxseg", "jaxseg.data"} <= ALLOWED.get(name, set()), name
        assert not any(other.split(".")[0] in ("experiments", "tests") for other in imported), name


def test_matplotlib_is_imported_by_plots_only_and_jax_not_by_data():
    for package in ("jaxseg", "experiments"):
        for name, imported in modules(package):
            roots = {other.split(".")[0] for other in imported}
            assert ("matplotlib" in roots) <= name.startswith("jaxseg.plots."), name
            if name.startswith("jaxseg.data") or name in ("experiments.datasets", "experiments.settings"):
                assert not roots & {"jax", "flax", "tensorflow"}, name


def test_one_place_applies_pmap():
    calls = {
        name
        for package in ("jaxseg", "experiments")
        for name, _ in modules(package)
        if "jax.pmap(" in (ROOT / pathlib.Path(*name.split("."))).with_suffix(".py").read_text()
    }
    assert calls == {"jaxseg.train"}
