import importlib.resources
import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_importing_the_package_imports_nothing_else_and_so_starts_no_device_and_takes_no_time():
    code = "import sys; before = set(sys.modules); import jaxseg; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    others = {name.partition(".")[0] for name in done.stdout.split()} - {"jaxseg"} - sys.stdlib_module_names
    assert "jaxseg" in done.stdout and not others


def test_the_package_tells_type_checkers_that_it_has_types():
    assert (importlib.resources.files("jaxseg") / "py.typed").is_file()
    packaging = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packaging["package-data"]["jaxseg"] == ["py.typed"]
