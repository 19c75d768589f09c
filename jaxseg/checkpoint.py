"""Orbax: the best and the last checkpoint of a run."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

BEST, LAST = "best", "last"


def open_checkpoints(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Opens, or makes, a folder that keeps two checkpoints: the best by validation mean IoU, and the last.

    Args:
      directory: made if it is missing.
    """

    def best_fn(metrics: dict[str, float]) -> float:
        return metrics["mean_iou"]

    # `max_to_keep` with `best_fn` would delete the last one.
    policies = [preservation_policy.LatestN(1), preservation_policy.BestN(n=1, get_metric_fn=best_fn)]
    options = ocp.CheckpointManagerOptions(
        best_fn=best_fn,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(directory.resolve(), options=options)


def save(manager: ocp.CheckpointManager, state: Any, mean_iou: float, meta: dict[str, Any]) -> None:
    """Saves a state under its step, in the background.

    Args:
      manager: from `open_checkpoints`.
      state: a `TrainState`; copied before this returns, so that its buffers may be donated.
      mean_iou: on the validation split; by it the best checkpoint is known.
      meta: what is needed to use the model later (class names, settings, stage, epoch), as JSON.

    Raises:
      ValueError: the folder has a checkpoint of this step already.
    """
    # np.array copies where np.asarray would show the device's own buffer, which the next step overwrites.
    host = jax.tree.map(np.array, state)
    items = ocp.args.Composite(
        model=ocp.args.StandardSave({"params": host.params, "batch_stats": host.batch_stats}),
        train=ocp.args.StandardSave({"step": host.step, "opt_state": host.opt_state}),
        meta=ocp.args.JsonSave(meta),
    )
    if not manager.save(int(host.step), args=items, metrics={"mean_iou": mean_iou}):
        raise ValueError(
            f"{manager.directory} already has a checkpoint of step {int(host.step)}: use another --workdir"
        )


def restore_model(manager: ocp.CheckpointManager, which: str, template: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the model, and not the optimizer.

    Args:
      manager: from `open_checkpoints`.
      which: `BEST` or `LAST`.
      template: {'params', 'batch_stats'}, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The variables, numpy arrays in the template's structure, and what was saved as `meta`.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    manager.wait_until_finished()
    step = manager.latest_step() if which == LAST else manager.best_step()
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {manager.directory}")
    template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), template)
    items = ocp.args.Composite(model=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore())
    restored = manager.restore(step, args=items)
    return restored["model"], restored["meta"]
