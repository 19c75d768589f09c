import ast
import dataclasses
import pathlib
import subprocess
import sys
from typing import Annotated, Literal

import pytest
import tyro

from experiments.arguments import quick_arguments

COMMANDS = sorted(
    path.stem
    for path in pathlib.Path(__file__).parents[1].joinpath("experiments").glob("*.py")
    if "__main__" in path.read_text()
)


def example(decorate):
    @dataclasses.dataclass(frozen=True)
    @decorate
    class Example:
        file: pathlib.Path | None = None
        where: Annotated[tyro.conf.Positional[pathlib.Path | None], tyro.conf.arg(metavar="[WHERE]")] = None
        pair: tuple[int, float] = (1, 2.0)
        many: tuple[int, ...] = ()
        kinds: tuple[Literal["a", "b"], ...] = ("a",)
        number: int | None = None
        """Explained in two
        lines, of which tyro makes one."""
        words: tuple[str, ...] | None = None
        size: tuple[int, int] | None = None
        word: Literal["x", "y"] | None = None
        plain: bool = False

    return Example


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "there --pair 3 4 --many 1 2 3 --kinds b a --number 5 --words a b --word y --plain",
        "--many --words 7 --pair -1 1e-3",
        "--kinds",
        "None --number None --words None",
        "--words None None",
        "--size 5 6 --file None",
    ],
)
def test_values_are_those_that_tyro_reads_by_itself(argv):
    plain, quick = (tyro.cli(example(decorate), args=argv.split()) for decorate in (lambda x: x, quick_arguments))
    assert vars(quick) == vars(plain)
    assert [type(x) for x in vars(quick).values()] == [type(x) for x in vars(plain).values()]
    assert all(type(x) is type(y) for x, y in zip(quick.pair, plain.pair, strict=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--pair 1", "Missing value for argument '--pair'. Expected 2 values."),
        ("--pair 1 x", "Error parsing --pair: expected INT FLOAT, not 1 x"),
        ("--size None", "Missing value for argument '--size'. Expected 2 values."),
        ("--many 1 x", "Error parsing --many: expected [INT [INT ...]], not 1 x"),
        ("--kinds a c", "invalid choice 'c' for argument '--kinds'. Expected one of"),
        ("--number 1.5", "Error parsing --number: expected INT, not 1.5"),
        ("--word None", "invalid choice 'None' for argument '--word'. Expected one of ('x', 'y')."),
        ("--word z", "invalid choice 'z' for argument '--word'. Expected one of ('x', 'y')."),
    ],
)
def test_a_mistake_names_the_option_and_what_it_takes(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(example(quick_arguments), args=argv.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.replace("│", " ").split())
    assert "{None}" not in err


def test_help_shows_types_and_defaults(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(example(quick_arguments), args=["--help"])
    out = capsys.readouterr().out
    words = " ".join(out.replace("│", " ").split())
    for shown in (
        "[WHERE] where (default: None)",
        "--pair INT FLOAT (default: 1 2.0)",
        "--number INT Explained in two lines, of which tyro makes one. (default: None)",
        "--words [STR [STR ...]] (default: None)",
    ):
        assert shown in words
    assert "in two lines, of" in out
    assert "{None}" not in words


@pytest.mark.parametrize("annotation", [int | str, int | str | None, tuple[object, int]])
def test_a_type_that_cannot_be_read_is_a_mistake_of_the_programmer(annotation):
    with pytest.raises(TypeError, match="an option cannot be of type"):
        quick_arguments(type("Options", (), {"__annotations__": {"option": annotation}}))


def test_help_of_every_command_loads_nothing_that_takes_long():
    code = """if True:
        import importlib, sys
        for name in sys.argv[1:]:
            try: importlib.import_module(f"experiments.{name}").main(["--help"])
            except SystemExit as stop: assert stop.code == 0
            slow = {"jax", "matplotlib", "numpy", "tensorflow", "typeguard"} & set(sys.modules)
            if slow: sys.exit(f"{name} loads {slow}")
    """
    assert len(COMMANDS) == 12
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        assert f"usage: python -m experiments.{name} [" in done.stdout


def test_a_path_that_may_be_none_is_completed_by_the_shell(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(example(quick_arguments), args=["--tyro-print-completion", "bash"], prog="example")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("COMPLETION_SPEC = "))
    kinds = {option["flags"][0]: option["type"] for option in ast.literal_eval(line.partition(" = ")[2])["options"]}
    assert kinds["--file"] == "path"
