"""What is freed is not asked of the kernel again, and what compiling took is given back."""

import gc
import os
import platform
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from experiments import baseline, improved, start
from experiments.memory import collecting_nothing_imported
from jaxseg import memory, train

CODE = """
import resource, threading
import numpy as np
from experiments.memory import keep_freed_memory

def allocate():
    for _ in range(5):
        np.ones(50_000_000, np.uint8)

def faults():
    # In a thread, as XLA's are: they have arenas of their own.
    thread = threading.Thread(target=allocate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread.start(), thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    keep_freed_memory()
faults()
print(faults())
"""


RESTARTING = """
import os, sys
from experiments import memory

memory._has_huge_pages = lambda: True
print(sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
memory.keep_freed_memory(may_restart=True)
"""


@pytest.mark.parametrize("others", ["", "glibc.malloc.tcache_count=3"])
def test_a_program_starts_again_once_with_its_command_line_and_huge_pages(others):
    environment = {**os.environ, "GLIBC_TUNABLES": others}
    command = [sys.executable, "-c", RESTARTING, "--workdir", "a b"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    tunables = f"{others}:glibc.malloc.hugetlb=1" if others else "glibc.malloc.hugetlb=1"
    assert said.splitlines() == [f"['--workdir', 'a b'] {others}", f"['--workdir', 'a b'] {tunables}"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    def faults(keep):
        command = [sys.executable, "-c", CODE.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # Of 61,000 pages of 4 KiB; fewer where the kernel gives huge ones.
    assert faults(keep=True) < 50
    assert faults(keep=False) > 100


COMPILING = """
import ctypes, pathlib, re
import jax
from experiments import memory

jax.jit(lambda x: x + 1)(1)
memory._LONG = {seconds}
memory.give_back_what_compiling_took(), memory.give_back_what_compiling_took()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
pieces = [libc.malloc(2**16) for _ in range(3200)]
for piece in pieces:
    libc.memset(piece, 1, 2**16)
# The last one stays, so that glibc cannot cut the rest off by itself.
for piece in pieces[:-1]:
    libc.free(piece)

def mebibytes():
    return int(re.search("VmRSS:[ \\t]*(.*) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

before = mebibytes()
jax.jit(lambda x: x * 2)(1)
print(before - mebibytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_was_freed_is_given_back_after_compiling():
    def given_back(seconds):
        command = [sys.executable, "-c", COMPILING.format(seconds=seconds)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # Of 200 MiB.
    assert given_back(seconds=0) > 150
    assert given_back(seconds=1e9) < 50


@pytest.fixture
def written(monkeypatch):
    """What was written down, once it was compiled: weak references."""
    found, serialize = [], serialize_executable.serialize

    def note(compiled):
        found.append(weakref.ref(compiled._executable))
        return serialize(compiled)

    monkeypatch.setattr(serialize_executable, "serialize", note)
    return found


def three_updates(update, number, written):
    """The state and the metrics after three updates on so many devices; of what was written down nothing is there."""
    devices = jax.devices()[:number]
    step = train.pmap_step(update, devices, donate=True, compact=True, keyed=True)
    key = train.replicate(jax.random.key(0), devices)
    state = before = train.replicate({"sum": jnp.zeros(3)}, devices)
    for batch in train.batches_on_devices([{"x": np.arange(12.0).reshape(4, 3)}] * 3, devices):
        state, metrics = step(state, batch, key)
    assert before["sum"].is_deleted()
    gc.collect()
    assert not any(executable() for executable in written)
    return jax.device_get((state, metrics))


def number_of_its_own():
    """In a program, which no earlier run can then have kept."""
    return int(np.random.default_rng().integers(2**30))


@pytest.mark.parametrize("number", [1, 2])
def test_a_training_step_is_loaded_and_what_was_compiled_is_gone(written, number):
    own = number_of_its_own()

    def update(state, batch, key):
        total = jax.lax.psum(batch["x"].sum(0), train.AXIS) + jax.random.randint(key, (), 5, 6)
        return {"sum": state["sum"] + total}, {"loss": total.mean(), "own": jnp.array(own)}

    state, metrics = three_updates(update, number, written)
    np.testing.assert_array_equal(state["sum"], 3 * (np.arange(12.0).reshape(4, 3).sum(0) + 5))
    assert metrics == {"loss": 27, "own": own}
    assert len(written) == 1


def test_a_training_step_that_was_kept_is_taken_as_it_is(written):
    own = number_of_its_own()

    def make_update():
        def update(state, batch, key):
            return {"sum": state["sum"] + jnp.sin(batch["x"]).sum(0)}, {"own": jnp.array(own)}

        return update

    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        compiled = three_updates(make_update(), 1, written)
        assert len(written) == 1
        # As in another process: of this function nothing is known.
        kept = three_updates(make_update(), 1, written)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    assert len(written) == 1
    jax.tree.map(np.testing.assert_array_equal, kept, compiled)


def test_a_step_that_calls_python_stays_as_it_was_compiled(written):
    seen = []

    def update(state, batch, key):
        jax.debug.callback(lambda x: seen.append(float(x)), batch["x"][0, 0])
        return {"sum": state["sum"] + batch["x"].sum(0)}, {}

    devices = jax.devices()[:1]
    step = train.pmap_step(update, devices, donate=True, compact=True, keyed=True)
    state, key = train.replicate({"sum": jnp.zeros(3)}, devices), train.replicate(jax.random.key(0), devices)
    for batch in train.batches_on_devices([{"x": np.full((1, 3), number)} for number in (2.0, 3.0)], devices):
        state, _ = step(state, batch, key)
    np.testing.assert_array_equal(state["sum"], [5.0, 5.0, 5.0])
    jax.effects_barrier()
    assert seen == [2, 3]


def test_a_first_call_that_was_broken_off_can_be_made_again():
    calls = []

    def step(x):
        calls.append(x)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return x + 1

    call = memory.reloaded(jax.jit(step), jax.devices()[:1])
    with pytest.raises(KeyboardInterrupt):
        call(jnp.zeros(3))
    np.testing.assert_array_equal(call(jnp.zeros(3)), [1, 1, 1])
    np.testing.assert_array_equal(call(jnp.ones(3)), [2, 2, 2])
    with pytest.raises(TypeError):
        call(jnp.zeros(4))
    assert len(calls) == 2


@pytest.mark.parametrize("module", [baseline, improved])
@pytest.mark.parametrize(("option", "may_restart"), [("--no-such-option", True), ("--help", False)])
def test_a_command_starts_again_before_its_options_are_read_but_not_to_explain_them(
    module, option, may_restart, monkeypatch, capsys
):
    asked, ending = [], []
    monkeypatch.setattr(
        start, "keep_freed_memory", lambda may_restart: asked.append((may_restart, capsys.readouterr()))
    )
    monkeypatch.setattr(start, "end_on_ctrl_c", ending.append)
    monkeypatch.setattr("sys.argv", ["program", option])
    with pytest.raises(SystemExit):
        module.main()
    assert asked == [(may_restart, ("", ""))] and ending == [True] and capsys.readouterr() != ("", "")


def test_the_collector_leaves_what_was_imported_alone():
    frozen = gc.get_freeze_count()
    try:
        with collecting_nothing_imported():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:  # as before, for the tests that follow in this process
        gc.unfreeze()
        gc.collect()
        gc.freeze()
