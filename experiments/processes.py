"""The processes of a run: one, or several on one or more machines that train together.

All of them read the data, each its part of every batch, and make the same updates. The first one, process 0, prepares,
reads and writes everything else; the others learn from it what they need.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.settings import Settings
from jaxseg import train

# Seconds until a process that says nothing counts as gone; one that ends is noticed at once, on the CPU at least.
_SILENCE = 60
# Seconds that a process which failed waits for the others, in case they failed for the same reason.
_GRACE = 10
# Milliseconds; whoever waits for a process that is gone hears of that sooner.
_LONG = 24 * 60 * 60 * 1000


class Mistake(ValueError):
    """Something that the user can put right: its message is one line for them. Any other ValueError is a defect."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which process this is, from 0, and of how many; with one, nothing here does anything."""

    index: int = 0
    number: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares, writes and talks."""
        return self.index == 0

    @property
    def part(self) -> tuple[int, int]:
        """The part of each batch that this process reads, as `jaxseg.data.loader.train_batches` takes it."""
        return self.index, self.number

    @contextlib.contextmanager
    def silence_others(self) -> Iterator[None]:
        """Within it only the first process prints; errors come from all."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield

    def gather(self, text: str) -> list[str]:
        """What each process says, in every process, by index."""
        if self.number == 1:
            return [text]
        said = np.frombuffer(text.encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(said.size))
        padded = np.zeros(max(1, sizes.max()), np.uint8)
        padded[: said.size] = said
        rows = multihost_utils.process_allgather(padded)
        return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    def from_first(self, text: str) -> str:
        """What the first process says, in every process."""
        return self.gather(text if self.first else "")[0]

    def arrays_from_first(self, tree: Any) -> Any:
        """The first process' tree of arrays, bit by bit; the others' give its structure, shapes and types.

        Returns:
          Numpy arrays; with one process, `tree` itself.
        """
        if self.number == 1:
            return tree
        leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
        # In one piece: a collective for each array would be compiled for each shape.
        flat = np.concatenate([np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves])
        flat = np.asarray(multihost_utils.broadcast_one_to_all(flat))
        pieces = np.split(flat, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
        copies = [
            np.frombuffer(piece.tobytes(), leaf.dtype).reshape(leaf.shape)
            for piece, leaf in zip(pieces, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, copies)

    @contextlib.contextmanager
    def share_mistakes(self) -> Iterator[None]:
        """Waits for all processes at its end; a ValueError or OSError in one of them is then an error in every one.

        Raises:
          Mistake: for a ValueError, and in the processes that made no mistake of their own.
          OSError: as it came.
        """
        mistake: Exception | None = None
        try:
            yield
        except ValueError as error:
            mistake = Mistake(str(error) or repr(error))
            mistake.__cause__ = error
        except OSError as error:
            mistake = error
        if self.number == 1:
            if mistake is not None:
                raise mistake
            return
        self._meet("mistakes", _LONG)
        said = self.gather("" if mistake is None else str(mistake) or repr(mistake))
        if mistake is not None:
            raise mistake
        for index, text in enumerate(said):
            if text:
                raise Mistake(f"process {index}: {text}")

    def wait_for_all(self) -> None:
        """Returns when all processes have come here."""
        if self.number > 1:
            self._meet("end", _LONG)

    def leave(self, code: int) -> int:
        """To be called last, with the exit code, which it returns.

        If the others do not come too it ends this process at once: only so they learn that it is gone.
        """
        if self.number > 1:
            try:
                self._meet("leave", _GRACE * 1000)
            except jax.errors.JaxRuntimeError:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code or 1)
        return code

    def _meet(self, name: str, milliseconds: int) -> None:
        # On the hosts, because the devices' collectives know no time limit. A meeting's name serves once.
        ocp.multihost.get_barrier_sync_fn()(key=f"jaxseg-{name}-{next(_MEETINGS)}", timeout_ms=milliseconds)


_MEETINGS = itertools.count()

ALONE = Processes()


def start(settings: Settings) -> Processes:
    """Connects the processes that the settings speak of; to be called before JAX looks for devices.

    Raises:
      ValueError: they cannot be found or reached, or have unequal numbers of devices.
    """
    if settings.coordinator is None and not settings.distributed:
        return ALONE
    # Its handler of SIGTERM would come in the way of ours.
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {}
    if settings.coordinator is not None:
        given = {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.num_processes,
            "process_id": settings.process_id,
            "cluster_detection_method": "deactivate",
        }
        who = f"process {settings.process_id} of {settings.num_processes}"
        print(f"{who}: waits at {settings.coordinator} for the others, five minutes at most", file=sys.stderr)
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_SILENCE, shutdown_timeout_seconds=_GRACE)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        if settings.coordinator is None:
            raise ValueError(
                f"--distributed: JAX finds no SLURM, Open MPI or GKE job to join ({reason}); start it with srun or"
                " mpirun, or give --coordinator, --num-processes and --process-id"
            ) from error
        raise ValueError(f"--coordinator {settings.coordinator}: the processes did not connect ({reason})") from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ValueError(f"each process must have equally many devices, not {[counts[key] for key in sorted(counts)]}")
    return Processes(jax.process_index(), jax.process_count())


class Agreement:
    """The largest number that any process names, known to all of them at the same call.

    Args:
      devices: those of all processes.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self._largest = train.pmap_step(lambda _, number: jax.lax.pmax(number, train.AXIS), devices)
        self._here = len(train.local_devices(devices))
        self._pending: collections.deque = collections.deque()

    def late(self, number: int) -> int:
        """Names a number from 0 up; returns what was agreed on some calls ago, so that no device waits for the host."""
        self._pending.append(self._ask(number))
        return int(self._pending.popleft()) if len(self._pending) > train.LAG else 0

    def now(self, number: int) -> int:
        """Names a number and waits for the others' numbers; what is still under way is forgotten."""
        self._pending.clear()
        return int(self._ask(number))

    def _ask(self, number: int) -> jax.Array:
        return self._largest((), np.full(self._here, number, np.int32))
