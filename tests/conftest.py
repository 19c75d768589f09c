"""Shared fixtures. Four simulated CPU devices, so that every test can compare one device with several."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# All must be set before jax is first imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
# Most programs run a few times here: compiling them takes longer. No optimisation and, where there still are any, the
# older emitters take a quarter of the time, and less yet in one piece, as other tests have the other cores (another XLA
# ends at a flag that it does not know); a test that trains for long calls for optimised programs (`optimised`).
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# PyTorch's threads would wait for each other where several workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one test compiled, the others and their subprocesses need not compile again; the workers inherit the folder.
COMPILED = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="jaxseg-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

from experiments.memory import keep_freed_memory  # noqa: E402

keep_freed_memory()

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def optimised():
    """Programs are optimised, as a user's are."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of data and weights beside the checkout; a test that needs it is skipped where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the folder {path} with CamVid and the ResNet-18 weights")
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Of several workers (`-n`), one that has nothing left to do takes over what another one has before it."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_finish() -> None:
    """Searches what is there now for garbage no more, and the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


def pytest_unconfigure() -> None:
    """Removes the compiled code, in the process that made its folder."""
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With JAXSEG_NO_SKIPS set, as in .ci/run, a skipped test fails the run unless what it lacks is a GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("JAXSEG_NO_SKIPS"):
        return
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "GPU" not in reason:
            print(f"\nskipped, which JAXSEG_NO_SKIPS forbids: {report.nodeid}: {reason}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
