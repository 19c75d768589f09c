"""The checkpoints of a run that was never trained: an encoder of one convolution and a decoder, random."""

import jax
import jax.numpy as jnp

from jaxseg import checkpoint, train
from jaxseg.segmenter import Segmenter
from tests.peers.small_run import SmallEncoder

WIDTHS = (8, 8, 4, 4, 4)
META = {
    "settings": {"encoder": "resnet18", "image_size": [32, 64], "batch_size": 4, "dataset": "shapes"},
    "names": ["sky", "road", "car"],
    "colours": [[0, 0, 0], [1, 2, 3], [255, 255, 255]],
    "stage_name": "stage 2: everything",
}


def save_run(workdir, decoder, scores=(0.5, 0.25), **meta):
    """Makes a checkpoint for each score, each of other parameters; returns their variables.

    Args:
      workdir: where; made.
      decoder: of `WIDTHS`.
      scores: mean IoU on the validation split, or None.
      meta: what is said of the run besides, or other than, `META`.
    """
    model, saved = Segmenter(SmallEncoder("resnet18"), decoder), []
    init = jax.jit(model.init)
    with checkpoint.open_checkpoints(workdir / "checkpoints") as manager:
        for epoch, score in enumerate(scores, 1):
            variables = init(jax.random.key(epoch), jnp.zeros((1, 32, 32, 3), jnp.uint8))
            # So that no class wins everywhere.
            head = variables["params"]["decoder"]["head"]
            head["kernel"] = 9 * jax.random.normal(jax.random.key(epoch), head["kernel"].shape)
            saved.append(variables)
            state = train.TrainState(jnp.array(epoch), variables["params"], variables.get("batch_stats", {}), {})
            checkpoint.save(manager, state, score, {**META, "epoch": epoch, **meta})
        checkpoint.wait(manager)
    return saved
