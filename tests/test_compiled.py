"""Where compiled programs are kept."""

import os
import subprocess
import sys

import pytest

from experiments import compiled

CODE = """
import jax
from experiments.compiled import keep_compiled_programs
keep_compiled_programs()
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


@pytest.fixture
def run(tmp_path):
    def run(**more):
        env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, "-c", CODE], env=env | more, capture_output=True, text=True, check=True)
        return done.stderr

    return run


def programs(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}


def test_programs_are_kept_in_the_cache_and_compiled_once(run, tmp_path):
    assert run() == ""
    first = programs(tmp_path / "cache" / "jaxseg" / "compiled")
    assert first
    assert run() == ""
    assert programs(tmp_path / "cache" / "jaxseg" / "compiled") == first


def test_a_folder_that_was_named_is_used_instead(run, tmp_path):
    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert programs(tmp_path / "named") and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_costs_no_more_than_a_warning(run, tmp_path):
    (tmp_path / "cache").write_text("a file")
    run()


def test_another_processor_has_another_folder(monkeypatch, tmp_path):
    folders = []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiled.jax.config, "update", lambda _, value: folders.append(value))
    compiled.keep_compiled_programs()
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    compiled.keep_compiled_programs()
    assert len({folder for folder in folders if isinstance(folder, str)}) == 2
