"""What is saved comes back, and only the best and the last are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import checkpoint
from jaxseg.train import TrainState


def make_state(step):
    params = {"encoder": {"kernel": jnp.full((2, 3), step, jnp.float32)}, "decoder": {"bias": jnp.arange(4.0)}}
    moments = jax.tree.map(jnp.zeros_like, params)
    return TrainState(jnp.array(step), params, {"encoder": {"mean": jnp.ones(3)}}, {"mu": moments})


TEMPLATE = {"params": make_state(0).params, "batch_stats": make_state(0).batch_stats}


@pytest.fixture
def manager(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "checkpoints") as manager:
        yield manager


def save(manager, step, mean_iou):
    checkpoint.save(manager, make_state(step), mean_iou, {"epoch": step, "names": ["sky", "road"]})


def restored_step(manager, which):
    variables, meta = checkpoint.restore_model(manager, which, TEMPLATE)
    assert meta["names"] == ["sky", "road"]
    assert variables["params"]["encoder"]["kernel"][0, 0] == meta["epoch"]
    return meta["epoch"]


def test_best_and_last_are_kept_and_nothing_else(manager):
    for step, mean_iou in [(10, 0.2), (20, 0.5), (30, 0.3), (40, 0.4)]:
        save(manager, step, mean_iou)
    assert restored_step(manager, checkpoint.BEST) == 20
    assert restored_step(manager, checkpoint.LAST) == 40
    kept = sorted(path.name for path in manager.directory.iterdir() if path.name.isdigit())
    assert kept == ["20", "40"]


def test_a_checkpoint_does_not_change_when_its_buffers_are_donated(manager):
    state = make_state(5)
    checkpoint.save(manager, state, 0.1, {})
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    double(state)
    variables, _ = checkpoint.restore_model(manager, checkpoint.LAST, TEMPLATE)
    np.testing.assert_array_equal(variables["params"]["encoder"]["kernel"], np.full((2, 3), 5.0))


def test_the_model_is_separate_from_the_optimizer(manager):
    save(manager, 1, 0.1)
    manager.wait_until_finished()
    assert {"model", "train", "meta"} <= {path.name for path in (manager.directory / "1").iterdir()}


def test_a_step_is_never_saved_twice(manager):
    save(manager, 1, 0.1)
    with pytest.raises(ValueError, match="step 1"):
        save(manager, 1, 0.1)


def test_no_checkpoint(manager):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore_model(manager, checkpoint.BEST, TEMPLATE)
