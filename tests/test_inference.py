"""A run that was trained is loaded as it was, and classifies as its own evaluation did."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import inference
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.inference import load_run, segment
from jaxseg.segmenter import Segmenter
from tests.peers.saved_run import WIDTHS, save_run
from tests.peers.small_run import SmallEncoder


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    """One strided convolution in the ResNet's place."""
    monkeypatch.setattr(inference, "ResNet", SmallEncoder)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.mark.parametrize("decoder", [BaselineDecoder, ImprovedDecoder])
def test_the_model_is_rebuilt_from_what_was_saved(tmp_path, decoder):
    best, last = save_run(tmp_path, decoder(3, WIDTHS))
    trained = load_run(tmp_path)
    assert trained.model == Segmenter(SmallEncoder("resnet18"), decoder(3, WIDTHS))
    assert equal(trained.variables, best) and not equal(trained.variables, last)
    assert equal(load_run(tmp_path, "last").variables, last)
    assert equal(load_run(tmp_path, 2).variables, last) and equal(load_run(tmp_path / "checkpoints/2").variables, last)
    assert trained.labels.names == ("sky", "road", "car") and trained.labels.colours[1] == (1, 2, 3)
    assert trained.image_size == (32, 64) and trained.settings["dataset"] == "shapes"
    assert trained.checkpoint == {"stage_name": "stage 2: everything", "epoch": 1, "score": 0.5}
    assert (
        trained.model.decoder.dtype == jnp.float32
        and load_run(tmp_path, dtype="bfloat16").model.decoder.dtype == jnp.bfloat16
    )


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    save_run(tmp_path / "run", BaselineDecoder(3, WIDTHS), scores=(None,))
    save_run(tmp_path / "other", BaselineDecoder(3, WIDTHS), settings={"encoder": "vgg"})
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "nowhere", "best", "no such folder"),
        (tmp_path / "empty", "best", "holds no checkpoint"),
        (tmp_path / "run", "best", "holds no checkpoint"),
        (tmp_path / "run", 7, "no checkpoint 7, only 1"),
        (tmp_path / "other", "last", "not one of a run"),
    ]
    for path, which, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_run(path, which)
        assert "\n" not in str(caught.value), path
    assert load_run(tmp_path / "run", "last").checkpoint["score"] is None


def test_segment_gives_what_the_runs_own_evaluation_does_at_any_size(tmp_path):
    save_run(tmp_path, BaselineDecoder(3, WIDTHS))
    trained = load_run(tmp_path)
    rng = np.random.default_rng(0)
    for size in [(1, 1), (32, 64), (45, 30)]:
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        classes = segment(trained, image)
        assert classes.shape == size and classes.dtype == np.uint8
    logits = trained.model.apply(trained.variables, image := rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)[None])
    assert np.array_equal(segment(trained, image[0]), logits[0].argmax(-1)) and len(np.unique(logits.argmax(-1))) > 1
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="H, W, 3"):
            segment(trained, wrong)


def test_importing_starts_no_device_and_the_package_comes_at_once():
    code = """
import time; start = time.perf_counter()
import jaxseg; seconds = time.perf_counter() - start
import jaxseg.inference, jax._src.xla_bridge as bridge, json
print(json.dumps([seconds, bridge.backends_are_initialized()]))
"""
    seconds, started = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert seconds < 0.2 and not started
