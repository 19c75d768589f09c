"""What is freed is not asked of the kernel again."""

import os
import platform
import subprocess
import sys

import pytest

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
