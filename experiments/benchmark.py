"""Measures speed and memory: training in both stages, validation and inference; beside PyTorch if asked to."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from experiments.arguments import quick_arguments
from experiments.memory import give_back_what_compiling_took, keep_freed_memory
from jaxseg.memory import give_back_freed_memory

_STATUS = pathlib.Path("/proc/self/status")
_PROCESSOR = pathlib.Path("/proc/cpuinfo")
# In training there are no pauses, after which the memory that a step gave back is slow to come again, for some steps.
_STEPS_AFTER_A_PAUSE = 3
# Of the table.
_LINE = "{:<13} {:<18} {:>9} {:>18} {:>9} {:>9} {:>8} {:>6} {:>8} {:>6}"
_LEGEND = (
    "ms/step: median (least-most) of all rounds; start: to the end of the first step; compile: how much longer that"
    " step takes than the next ones, in which nothing is traced and compiled; share: of the matrix product's speed;"
    " MiB: the process' peak memory in the rounds, on macOS and on a GPU since it started; start, compile and MiB of"
    " several starts: the median; ratio: jaxseg's ms/step divided by the row's"
)


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Settings:
    """Settings of the benchmark."""

    model: Literal["baseline", "improved"] = "baseline"
    """The model; the improved one rotates its training images by up to 30 degrees and drops a fifth in stage 2."""
    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """The encoder."""
    image_size: tuple[int, int] = (192, 224)
    """Height and width in pixels."""
    batch_size: int = 4
    """Images in a batch, over all devices."""
    num_classes: int = 9
    """Number of classes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The numbers of jaxseg's computation; PyTorch's are given by --torch-forms."""
    work: tuple[Literal["stage1", "stage1-cached", "stage2", "validation", "inference", "loading"], ...] = (
        "stage1", "stage2", "validation", "inference",
    )  # fmt: skip
    """What is measured: training with the encoder frozen, the same on features that were computed before (jaxseg
    only), training of everything, validation at the images' size, inference, which ends with the class of each pixel on
    the device, and whether loading JPEG and PNG files keeps ahead of the training of either stage."""
    loader: bool = False
    """Read the batches from JPEG files (made for it, in a temporary folder) instead of giving the same one again."""
    against: Literal["nothing", "torch"] = "nothing"
    """Do the same in PyTorch, in turns, and print ratios of the times; torch must be installed."""
    torch_forms: tuple[Literal["eager", "compile", "bf16", "compile-bf16"], ...] = ("eager",)
    """How PyTorch does it: eager, torch.compile, or these under bf16 autocast; always channels_last."""
    starts: int = 1
    """How often all programs are started anew (but not for loading or the breakdown), each piece of work once before
    any again: where its memory comes to lie can make some percent of a difference for as long as a process lives, and
    of three starts or more the median leaves a short slow spell out. Times are pooled; of starting and of the
    peak it is the median."""
    kept_programs: bool = False
    """Keep jaxseg's compiled programs where training commands keep them, and measure as those run from their second
    start on, which starts sooner and on a CPU may need a little less memory; torch.compile keeps its own by default,
    anyway. All programs are started once more, before, for what is not kept yet."""
    rounds: int = 7
    """Rounds of each start; all programs take turns in each, and begin with three steps that are not measured."""
    steps: int = 5
    """Steps in a round that are measured."""
    json: pathlib.Path | None = None
    """A file for all numbers."""
    profile: pathlib.Path | None = None
    """A folder for a trace of one round of each piece of jaxseg's work, for TensorBoard or Perfetto."""
    breakdown: bool = False
    """Also time each layer alone, forward and backward, in training; in a step it may take another time."""


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark with the given arguments, or the command line's; returns the exit code."""
    settings = tyro.cli(Settings, prog="python -m experiments.benchmark", description=__doc__, args=argv)
    try:
        check(settings)
        keep_freed_memory(may_restart=argv is None)
        results = measure(settings)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def check(settings: Settings) -> None:
    """Raises ValueError if a value is out of range or PyTorch is missing."""
    for option in ("batch_size", "num_classes", "starts", "rounds", "steps"):
        if getattr(settings, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be above 0, not {getattr(settings, option)}")
    if min(settings.image_size) < 8:
        raise ValueError(f"--image-size must be 8 or more, not {settings.image_size[0]} {settings.image_size[1]}")
    if settings.model == "improved" and "stage1-cached" in settings.work:
        raise ValueError("--work stage1-cached is for the baseline: the improved model rotates its images")
    if not settings.work:
        raise ValueError("--work names nothing to measure")
    for option in ("work", "torch_forms"):
        if twice := [name for name in getattr(settings, option) if getattr(settings, option).count(name) > 1]:
            raise ValueError(f"--{option.replace('_', '-')} names {twice[0]} twice")
    if settings.torch_forms != Settings.torch_forms and settings.against != "torch":
        raise ValueError("--torch-forms is for --against torch: add that")
    if settings.json and not settings.json.parent.is_dir():
        raise ValueError(f"--json {settings.json}: no folder {settings.json.parent}")
    if settings.profile and settings.profile.exists() and not settings.profile.is_dir():
        raise ValueError(f"--profile {settings.profile} is a file: name a folder")
    if settings.against == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise ValueError("--against torch needs PyTorch: python -m pip install torch") from None


def measure(settings: Settings) -> dict[str, Any]:
    """Measures everything that the settings ask for, printing it; returns all numbers as JSON takes them."""
    programs = ["jaxseg"]
    if settings.against == "torch":
        programs += [f"torch {form}" for form in settings.torch_forms]
    with _Worker("jaxseg", "peak", settings) as worker:
        results: dict[str, Any] = {"settings": _as_json(settings), **worker.machine, "work": {}}
    if settings.against == "torch":
        results["versions"] += f", torch {importlib.metadata.version('torch')}"
    print(f"{results['device']}, {results['versions']}; matrix product {results['peak_gflops']:.0f} GFLOP/s")
    print(f"{settings.model}, {settings.encoder}, {settings.image_size[0]}x{settings.image_size[1]},", end=" ")
    loads = "loader included" if settings.loader else "loader not included"
    kept = ", compiled programs kept" if settings.kept_programs else ""
    started = f", {settings.starts} starts" if settings.starts > 1 else ""
    print(f"batch {settings.batch_size}, {settings.dtype}, {loads}{kept}{started}")
    if pieces := [work for work in settings.work if work != "loading"]:
        _measure_works(pieces, programs, settings, results)
    if "loading" in settings.work:
        with _Worker("jaxseg", "loading", settings) as worker:
            results["loading"] = worker.machine["loading"]
        print_loading(results["loading"])
    if settings.breakdown:
        with _Worker("jaxseg", "breakdown", settings) as worker:
            results["breakdown"] = worker.machine["breakdown"]
        print_breakdown(results["breakdown"])
    return results


def _measure_works(works: Sequence[str], programs: list[str], settings: Settings, results: dict[str, Any]) -> None:
    """Measures pieces of work, printing each one's rows after its last start; the numbers go to `results["work"]`.

    All pieces are started once before any is started again, so that a slow spell of the machine falls on a part of
    several, and not on all of one. If a program fails, or somebody breaks off, the rows of the starts until then are
    printed, and go nowhere.
    """
    from tqdm import tqdm

    print(
        _LINE.format(
            "work", "program", "images/s", "ms/step", "start s", "compile s", "GFLOP/s", "share", "MiB", "ratio"
        )
    )
    turns = {work: programs[:1] if work == "stage1-cached" else programs for work in works}
    starts: dict[str, list[dict[str, Any]]] = {work: [] for work in turns}
    passes = settings.starts + settings.kept_programs
    try:
        with tqdm(total=passes * len(turns), unit="start", leave=False, disable=None) as bar:
            for number, (work, takers) in itertools.product(range(passes), turns.items()):
                bar.set_description(work)
                if settings.kept_programs and number == 0:
                    for program in takers:
                        _Worker(program, work, settings).close()
                else:
                    starts[work].append(_measure_start(work, takers, settings, profiled=not starts[work]))
                if len(starts[work]) == settings.starts:
                    rows = _rows(starts[work], settings, results["peak_gflops"])
                    results["work"][work] = rows
                    with bar.external_write_mode():
                        _print_rows(work, rows)
                bar.update()
    finally:
        _print_unfinished({work: starts[work] for work in turns if work not in results["work"]}, settings, results)
    print(_LEGEND)


def _print_unfinished(starts: dict[str, list[dict[str, Any]]], settings: Settings, results: dict[str, Any]) -> None:
    """Prints what was measured of these pieces of work before a program failed, or somebody broke off."""
    for work, done in starts.items():
        if done:
            print(f"after {len(done)} of {settings.starts} starts:")
            _print_rows(work, _rows(done, settings, results["peak_gflops"]))
    if any(starts.values()):
        print(_LEGEND)


def _print_rows(work: str, rows: dict[str, dict[str, Any]]) -> None:
    for program, row in rows.items():
        spread = f"{row['ms']:.1f} ({row['ms_min']:.1f}-{row['ms_max']:.1f})"
        numbers = [f"{row['images_per_s']:.1f}", spread, f"{row['start_s']:.1f}", f"{row['compile_s']:.1f}"]
        numbers += [
            f"{row['gflops']:.0f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_mib']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        print(_LINE.format(work, program, *numbers), flush=True)


def print_loading(rows: list[dict[str, Any]]) -> None:
    """Prints how fast files are read, how fast a step takes what is there, and how fast it is with the reading."""
    line = "{:<9} {:<6} {:>14} {:>14} {:>7} {:>14} {:>7}"
    print("\n" + line.format("training", "files", "read images/s", "step images/s", "ratio", "both images/s", "kept"))
    for row in rows:
        numbers = [f"{row[name]:.1f}" for name in ("read_images_per_s", "step_images_per_s", "both_images_per_s")]
        read, step, both = numbers
        print(line.format(row["work"], row["files"], read, step, f"{row['ratio']:.2f}", both, f"{row['kept']:.0%}"))
    print("medians of the rounds; ratio: read / step, each alone; kept: of the step's speed, while files are read")


def print_breakdown(rows: list[dict[str, Any]]) -> None:
    """Prints the times of all layers, and their sums."""
    print(f"\n{'layer':<34} {'input':>16} {'forward ms':>11} {'GFLOP/s':>8} {'backward ms':>12} {'GFLOP/s':>8}")
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith(("_ms", "gflop"))}
    for row in [*rows, {"name": "together", "input": [], **total}]:
        shape, numbers = "x".join(map(str, row["input"])), []
        for gflop, ms, width in (("gflop", "forward_ms", 11), ("backward_gflop", "backward_ms", 12)):
            speed = f"{row[gflop] / row[ms] * 1e3:.0f}" if row[gflop] else ""
            numbers.append(f"{row[ms]:>{width}.2f} {speed:>8}" if row[ms] else " " * (width + 9))
        print(f"{row['name']:<34} {shape:>16} {' '.join(numbers)}")


def _measure_start(work: str, programs: list[str], settings: Settings, profiled: bool) -> dict[str, dict[str, Any]]:
    """Starts all programs on a piece of work, which then take turns; each one's rounds in ms a step, peak and more."""
    with contextlib.ExitStack() as stack:
        workers = {program: stack.enter_context(_Worker(program, work, settings)) for program in programs}
        times: dict[str, list[float]] = {program: [] for program in programs}
        for _ in range(settings.rounds):
            for program, worker in workers.items():
                times[program].append(1e3 * worker.ask("round") / settings.steps)
        start = {
            program: {"ms": times[program], "peak_mib": worker.ask("peak"), **worker.machine}
            for program, worker in workers.items()
        }
        if settings.profile and profiled:
            workers["jaxseg"].ask("profile")
    return start


def _rows(starts: list[dict[str, dict[str, Any]]], settings: Settings, peak_gflops: float) -> dict[str, dict[str, Any]]:
    """The programs' rows: of all starts' rounds, the medians of what each start has one of, and each start's."""
    rows = {}
    for program in starts[0]:
        its = [start[program] for start in starts]
        times = [ms for start in its for ms in start["ms"]]
        ms, gflop_per_image = statistics.median(times), its[0]["gflop_per_image"]
        images_per_s = 1e3 * settings.batch_size / ms
        rows[program] = {
            "ms": ms,
            "ms_min": min(times),
            "ms_max": max(times),
            "images_per_s": images_per_s,
            "peak_mib": statistics.median(start["peak_mib"] for start in its),
            **{name: statistics.median(start[name] for start in its) for name in ("start_s", "compile_s")},
            "gflop_per_image": gflop_per_image,
            "gflops": gflop_per_image * images_per_s,
            "share_of_peak": gflop_per_image * images_per_s / peak_gflops,
            "starts": its,
        }
    return {program: row | {"ratio": rows["jaxseg"]["ms"] / row["ms"]} for program, row in rows.items()}


class _Worker:
    """A process of its own for each program, so that memory is its own and one's threads are not the other's."""

    def __init__(self, program: str, work: str, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, program, work, settings), daemon=True)
        self._process.start()
        theirs.close()
        self.machine = self._receive(f"{program}, {work}")

    def ask(self, question: str) -> float:
        """Seconds of a round, or the peak memory in MiB."""
        self._pipe.send(question)
        return self._receive(question)

    def _receive(self, what: str) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{what}: the process ended; its last words are above") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{what}: {answer}")
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Any, program: str, work: str, settings: Settings) -> None:
    """A worker's whole life: answers, then rounds until the pipe is closed."""
    keep_freed_memory()
    # On a GPU the programs share its memory: JAX must not take most of it at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if program == "jaxseg" and work == "loading":
        from experiments.loading import measure_loading

        pipe.send({"loading": measure_loading(_load(settings), settings.rounds, settings.steps)})
        return
    if program == "jaxseg" and work in ("peak", "breakdown"):
        pipe.send(_describe_machine() if work == "peak" else {"breakdown": _break_down(_load(settings), settings)})
        return
    from experiments import works

    load = _load(settings)
    with works.open_batches(load, work) as batches:
        try:
            began = time.perf_counter()
            if program == "jaxseg":
                if settings.kept_programs:
                    _keep_programs()
                give_back_what_compiling_took()
                work_on = works.prepare(work, load, batches)
            else:
                from tests.peers import torch_works

                work_on = torch_works.prepare(work, load, batches, program.partition(" ")[2])
            prepared = time.perf_counter()
            work_on(1)
            first = time.perf_counter()
            work_on(settings.steps)
            step_s = (time.perf_counter() - first) / settings.steps
            _forget_peak()
        except Exception as error:  # whatever it is, the other process must hear of it
            pipe.send(RuntimeError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
            return
        took = {"start_s": first - began, "compile_s": max(0.0, first - prepared - step_s)}
        pipe.send(took | {"gflop_per_image": works.gigaflops(work, load)})
        while True:
            try:
                question = pipe.recv()
            except EOFError:
                return
            pipe.send(_answer(question, work_on, program, settings, work))


def _keep_programs() -> None:
    import jax

    from experiments.compiled import keep_compiled_programs

    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        raise ValueError("--kept-programs: JAX_ENABLE_COMPILATION_CACHE is off, and nothing is kept; unset it")
    keep_compiled_programs()


def _answer(question: str, work_on: Any, program: str, settings: Settings, work: str) -> float:
    if question == "peak":
        return _peak_memory(program)
    if question == "profile" and settings.profile:
        import jax

        with jax.profiler.trace(str(settings.profile / work)):
            work_on(settings.steps)
        return 0.0
    work_on(_STEPS_AFTER_A_PAUSE)
    began = time.perf_counter()
    work_on(settings.steps)
    return time.perf_counter() - began


def _load(settings: Settings) -> Any:
    from experiments.works import Load

    names = {field.name for field in dataclasses.fields(Load)} & {field.name for field in dataclasses.fields(Settings)}
    return Load(**{name: getattr(settings, name) for name in names})


def _as_json(settings: Settings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in values.items()}


def _peak_memory(program: str) -> float:
    """MiB: what the program had on the GPU at most, or the process' largest resident set since `_forget_peak`."""
    if program == "jaxseg":
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"] / 2**20
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
    if match := _STATUS.exists() and re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()):
        return int(match[1]) / 2**10
    # In KiB; macOS has bytes. Of a program that another one started it may be the other's.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _forget_peak() -> None:
    """Lets the process' largest resident set begin anew, without what starting left, where the system can: on Linux."""
    give_back_freed_memory()
    with contextlib.suppress(OSError):
        (_STATUS.parent / "clear_refs").write_text("5")


def _describe_machine() -> dict[str, Any]:
    """What it runs on, and the speed of a large matrix product: float32, or on a GPU what JAX makes of it."""
    import flax
    import jax
    import jax.numpy as jnp

    from jaxseg.cpu import compiler_options

    product, side = jax.jit(jnp.matmul, compiler_options=compiler_options()), 2048
    a = jnp.ones((side, side))
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    devices = jax.local_devices()
    return {
        "device": f"{len(devices)} {_name(devices[0].device_kind)} ({os.cpu_count()} cores)",
        "versions": f"jax {jax.__version__}, flax {flax.__version__}",
        "peak_gflops": 2 * side**3 / min(seconds) / 1e9,
    }


def _name(kind: str) -> str:
    """What JAX calls a device; a processor it only calls "cpu", and Linux knows more."""
    if kind != "cpu" or not _PROCESSOR.exists():
        return kind
    match = re.search(r"^model name\s*: (.+)$", _PROCESSOR.read_text(), re.MULTILINE)
    return match[1] if match else kind


def _break_down(load: Any, settings: Settings) -> list[dict[str, Any]]:
    """Times each layer alone, the loss and the optimizer: the median of the rounds.

    The forward pass is that of inference, the backward pass that of stage 2.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments import works
    from jaxseg import initializers
    from jaxseg.cpu import compiler_options
    from jaxseg.layers import max_pool
    from jaxseg.losses import pixel_cross_entropy
    from jaxseg.optimizer import make_optimizer

    def milliseconds(function: Any, *args: Any) -> float:
        function = jax.jit(function, compiler_options=compiler_options())
        jax.block_until_ready(function(*args))
        times = []
        for _ in range(settings.rounds):
            began = time.perf_counter()
            for _ in range(settings.steps):
                jax.block_until_ready(function(*args))
            times.append(1e3 * (time.perf_counter() - began) / settings.steps)
        return statistics.median(times)

    def row(name: str, function: Any, params: Any, x: Any, gflop: float = 0.0, input_grad: bool = True) -> dict:
        y, arguments = jax.jit(function)(params, x), (0, 1) if input_grad else (0,)

        def pull_back(params: Any, x: Any, y: Any) -> Any:
            return jax.grad(lambda params, x: jnp.vdot(function(params, x), y), arguments)(params, x)

        return {
            "name": name,
            "input": list(x.shape),
            "gflop": gflop,
            "backward_gflop": gflop * len(arguments),
            "forward_ms": milliseconds(function, params, x),
            "backward_ms": milliseconds(pull_back, params, x, y),
        }

    rows = []
    for layer in works.list_layers(load):
        x = jax.random.normal(jax.random.key(0), layer.shape, layer.module.dtype)
        variables = layer.module.init(jax.random.key(1), x)
        stats = {name: tree for name, tree in variables.items() if name != "params"}

        def apply(params: Any, x: Any, layer: Any = layer, stats: Any = stats) -> Any:
            return layer.module.apply({"params": params, **stats}, x, mutable=["batch_stats"])[0]

        # An image's own gradient is not computed.
        rows.append(row(layer.name, apply, variables["params"], x, layer.gigaflops, layer.shape[-1] != 3))
        if layer.name == "encoder/bn1":
            rows.append(row("max_pool", lambda _, x: max_pool(x), {}, x))
    size = (load.batch_size, *load.image_size)
    logits = jax.random.normal(jax.random.key(0), (*size, load.num_classes))
    label = jnp.asarray(np.random.default_rng(0).integers(0, load.num_classes, size))
    rows.append(row("loss", lambda _, logits: pixel_cross_entropy(logits, label), {}, logits))
    image = np.zeros((1, 64, 64, 3), np.uint8)
    params = jax.device_put(initializers.init(works.make_model(load), jax.random.key(0), image)["params"])
    tx = make_optimizer(1e-3, freeze_encoder=False)
    update = {"name": "Adam", "input": [sum(leaf.size for leaf in jax.tree.leaves(params))], "gflop": 0.0}
    update |= {"forward_ms": milliseconds(tx.update, params, tx.init(params), params)}
    return [*rows, update | {"backward_gflop": 0.0, "backward_ms": 0.0}]


if __name__ == "__main__":
    sys.exit(main())
