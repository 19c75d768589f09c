"""What is saved comes back or is known to be damaged, and only the best and the last two are kept."""

import errno
import json
import os
import pathlib
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


def test_a_checkpoint_that_is_no_longer_kept_goes_at_once_or_not_at_all(manager, monkeypatch):
    """A process that is killed while one is deleted leaves no half of it."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        for step in (1, 2, 3):
            save(manager, step, 0.1 * step)
        checkpoint.wait(manager)
    names = {path.name for path in manager.directory.iterdir()}
    assert names == {"2", "3", "deleted"}
    whole, moved = ({path.name for path in (manager.directory / name).iterdir()} for name in ("3", "deleted/1"))
    assert moved == whole
    with checkpoint.open_checkpoints(pathlib.Path(manager.directory)) as again:
        assert {path.name for path in again.directory.iterdir()} == {"2", "3"}
    save(manager, 4, 0.4)
    checkpoint.wait(manager)
    assert {path.name for path in manager.directory.iterdir()} == {"3", "4"}


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
    with pytest.raises(OSError, match=r"disk has 0.0 MiB left"):
        save(manager, 2, 0.6)
    assert restored_step(manager, checkpoint.LAST) == 1


def test_what_cannot_be_written_is_named_before_orbax_tries(manager, monkeypatch):
    save(manager, 1, 0.5)

    def no_quota(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", no_quota, raising=False)
    with pytest.raises(OSError, match="quota exceeded") as caught:
        save(manager, 2, 0.6)
    assert str(manager.directory) in str(caught.value) and "\n" not in str(caught.value)
    assert restored_step(manager, checkpoint.LAST) == 1


@pytest.mark.parametrize(
    ("item", "edit", "said"),
    [
        ("meta/metadata", lambda meta: meta.update(epoch=7), "description"),
        ("meta/metadata", lambda meta: meta.pop("names"), "description"),
        ("metrics/metrics", lambda score: score.update(mean_iou=0.9), "score"),
    ],
)
def test_what_is_edited_by_hand_is_noticed(tmp_path, item, edit, said):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        save(manager, 1, 0.5)
    path = tmp_path / "1" / item
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with checkpoint.open_checkpoints(tmp_path) as manager, pytest.raises(ValueError, match=f"of its {said} is wrong"):
        checkpoint.restore_model(manager, checkpoint.LAST, TEMPLATE)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"mean_iou": null}'])
def test_a_score_that_cannot_be_read_costs_that_checkpoint_only(tmp_path, capsys, text):
    with checkpoint.open_checkpoints(tmp_path) as manager:
        for step in (1, 2):
            save(manager, step, 0.1 * step)
    (tmp_path / "2" / "metrics" / "metrics").write_text(text)
    with checkpoint.open_checkpoints(tmp_path) as manager:
        assert restored_step(manager, checkpoint.BEST) == restored_step(manager, checkpoint.LAST) == 1
    said = capsys.readouterr().err
    assert "now called damaged-2" in said and said.count("\n") == 1
    assert [path.name for path in checkpoint.list_set_aside(tmp_path)] == ["damaged-2"]


def test_one_number_can_be_set_aside_again_and_again(tmp_path):
    names = []
    for _ in range(3):
        with checkpoint.open_checkpoints(tmp_path) as manager:
            save(manager, 1, 0.5)
            checkpoint.wait(manager)
            names.append(checkpoint.set_aside(manager, 1).name)
    assert names == ["damaged-1", "damaged-1-2", "damaged-1-3"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(manager, monkeypatch, error):
    save(manager, 1, 0.5)
    checkpoint.wait(manager)

    def unreadable(*_):
        raise error

    monkeypatch.setattr(checkpoint, "open", unreadable, raising=False)
    with pytest.raises(OSError, match=error.strerror):
        checkpoint.restore_model(manager, checkpoint.LAST, TEMPLATE)


def test_too_little_memory_is_no_damage(manager, monkeypatch):
    save(manager, 1, 0.5)

    def restore(*_, **__):
        raise MemoryError

    monkeypatch.setattr(type(manager), "restore", restore)
    with pytest.raises(MemoryError):
        checkpoint.restore_model(manager, checkpoint.LAST, TEMPLATE)


def test_no_checkpoint(manager):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore_model(manager, checkpoint.BEST, TEMPLATE)


def test_all_of_a_checkpoint_is_on_the_disk_before_the_next_is_begun(manager, monkeypatch):
    """What a power cut leaves is what was fsynced; Orbax does it for the numbers alone."""
    synced, fsync, begin = set(), os.fsync, type(manager).save

    def record(opened):
        synced.add(os.fstat(opened).st_ino)
        fsync(opened)

    def is_on_the_disk(number):
        path = pathlib.Path(manager.directory) / str(number)
        return synced >= {each.stat().st_ino for each in (*path.rglob("*"), path, path.parent)}

    def begin_another(self, number, **options):
        assert number == 1 or is_on_the_disk(number - 1)
        return begin(self, number, **options)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(type(manager), "save", begin_another)
    for step in (1, 2):
        save(manager, step, 0.5)
    checkpoint.wait(manager)
    assert is_on_the_disk(2)


@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_what_orbax_says_of_a_checkpoint_that_it_cannot_write_is_one_line(manager, monkeypatch, where):
    save(manager, 1, 0.5)
    checkpoint.wait(manager)

    def fail(*_, **__):
        raise ValueError("no space left\nand a hundred lines more")

    with monkeypatch.context() as patch:
        patch.setattr(type(manager), where, fail)
        with pytest.raises(OSError, match=r"cannot be written to .*checkpoints \(no space left\)$"):
            save(manager, 2, 0.6)
    assert restored_step(manager, checkpoint.LAST) == 1


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_named(manager, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save(manager, 1, 0.5)
    checkpoint.wait(manager)
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(OSError, match=r"^why; it cannot be renamed to damaged-1 either \(Permission denied\)$"):
        checkpoint.set_aside(manager, 1, "why")
