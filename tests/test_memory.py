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
