"""What is saved comes back or is known to be damaged, and only the best and the last two are kept."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import checkpoint, train
from jaxseg.optimizer import make_optimizer
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


def kept(manager):
    checkpoint.wait(manager)
    return {checkpoint.read_meta(manager, number)["epoch"] for number in manager.all_steps()}


def test_best_and_the_last_two_are_kept_and_nothing_else(manager):
    for step, mean_iou in [(10, 0.2), (20, 0.5), (30, 0.3), (40, 0.4), (50, 0.45)]:
        save(manager, step, mean_iou)
    assert restored_step(manager, checkpoint.BEST) == 20
    assert restored_step(manager, checkpoint.LAST) == 50
    assert kept(manager) == {20, 40, 50}
    folders = [path for path in manager.directory.iterdir() if path.name.isdigit()]
    assert len(folders) == 3


def test_a_checkpoint_without_a_score_is_the_last_but_never_the_best(manager):
    for step, mean_iou in [(10, None), (20, 0.5), (25, None), (30, 0.3), (35, None)]:
        save(manager, step, mean_iou)
    assert restored_step(manager, checkpoint.BEST) == 20
    assert restored_step(manager, checkpoint.LAST) == 35
    assert kept(manager) == {20, 30, 35}


def test_of_equal_scores_the_later_is_the_best(manager):
    for step in (10, 20):
        save(manager, step, 0.5)
    assert restored_step(manager, checkpoint.BEST) == 20


def test_a_whole_state_comes_back(manager):
    variables = {"params": make_state(3).params, "batch_stats": make_state(3).batch_stats}
    tx = make_optimizer(1e-3, freeze_encoder=True)
    state = train.start_stage(variables, tx, jax.local_devices()[:1], step=7)
    moved = jax.tree.map(lambda x: x + 1, state)
    checkpoint.save(manager, moved, None, {})
    restored = checkpoint.restore_state(manager, checkpoint.LAST, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, moved)


def test_a_checkpoint_does_not_change_when_its_buffers_are_donated(manager):
    state = make_state(5)
    checkpoint.save(manager, state, 0.1, {})
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    double(state)
    variables, _ = checkpoint.restore_model(manager, checkpoint.LAST, TEMPLATE)
    np.testing.assert_array_equal(variables["params"]["encoder"]["kernel"], np.full((2, 3), 5.0))


def test_the_model_is_separate_from_the_optimizer(manager):
    save(manager, 1, 0.1)
    checkpoint.wait(manager)
    assert {"model", "train", "meta"} <= {path.name for path in (manager.directory / "1").iterdir()}


def test_a_state_that_is_not_finite_is_not_saved(manager):
    save(manager, 1, 0.1)
    bad = make_state(2)
    bad.params["decoder"]["bias"] = bad.params["decoder"]["bias"].at[1].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="step 2"):
        checkpoint.save(manager, bad, 0.9, {})
    assert restored_step(manager, checkpoint.BEST) == 1


def test_a_changed_number_is_noticed_and_the_checkpoint_set_aside(tmp_path):
    template = {"params": {"kernel": np.zeros((64, 64), np.float32)}, "batch_stats": {}}
    with checkpoint.open_checkpoints(tmp_path) as manager:
        for step in (1, 2):
            kernel = np.random.default_rng(step).standard_normal((64, 64)).astype(np.float32)
            checkpoint.save(manager, TrainState(np.int32(step), {"kernel": kernel}, {}, {}), 0.5, {"step": step})
    largest = max((tmp_path / "2" / "model").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        with pytest.raises(ValueError, match=r"/2 is damaged"):
            checkpoint.restore_model(manager, checkpoint.LAST, template)
        assert checkpoint.set_aside(manager, 2).name == "damaged-2"
        assert checkpoint.restore_model(manager, checkpoint.LAST, template)[1]["step"] == 1


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_file_is_an_error_of_one_line(tmp_path, damage):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        save(manager, 1, 0.5)
    for path in [path for path in (tmp_path / "1" / "model").rglob("*") if path.is_file()]:
        path.unlink() if damage == "remove" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with checkpoint.open_checkpoints(tmp_path) as manager, pytest.raises(ValueError, match="damaged") as caught:
        checkpoint.restore_model(manager, checkpoint.BEST, TEMPLATE)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_named_and_what_is_there_kept(manager, monkeypatch):
    save(manager, 1, 0.5)
    usage = shutil.disk_usage(manager.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50))
    with pytest.raises(OSError, match="disk has 0 MiB left"):
        save(manager, 2, 0.6)
    assert restored_step(manager, checkpoint.LAST) == 1


def test_no_checkpoint(manager):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore_model(manager, checkpoint.BEST, TEMPLATE)
