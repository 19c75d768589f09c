"""The mean over devices against NumPy's, and that a single device waits for nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import train
from jaxseg.decoders import ImprovedDecoder
from jaxseg.devices import mean_over_devices
from jaxseg.optimizer import make_optimizer
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

DEVICES = jax.local_devices()
NUM_CLASSES = 3


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_mean_over_devices_is_that_of_all(number):
    tree = {
        "a": np.arange(3.0 * number, dtype=np.float32).reshape(number, 3) ** 2,
        "b": np.float32([5, 3, 0, 2])[:number],
    }
    mean = functools.partial(mean_over_devices, axis_name="batch")
    for together in (jax.pmap(mean, "batch", devices=DEVICES[:number]), jax.vmap(mean, axis_name="batch")):
        got = together(tree)
        for name, x in tree.items():
            np.testing.assert_allclose(got[name], np.broadcast_to(x.mean(0), x.shape), rtol=1e-6)


def test_over_no_axis_it_is_the_array_itself():
    x = jnp.arange(3.0)
    assert mean_over_devices(x, None) is x


@pytest.mark.parametrize(("number", "waits"), [(1, False), (2, True)])
@pytest.mark.parametrize("freeze", [True, False])
def test_only_several_devices_wait_for_each_other_in_a_step(freeze, number, waits):
    model = Segmenter(ResNet("resnet18", axis_name=train.AXIS), ImprovedDecoder(NUM_CLASSES, axis_name=train.AXIS))
    tx, devices = make_optimizer(1e-3, freeze), DEVICES[:number]
    step = functools.partial(train.train_step, model=model, tx=tx, freeze_encoder=freeze, axis_name=train.AXIS)
    step = train.pmap_step(step, devices, keyed=True)

    def start():
        variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.uint8))
        return train.TrainState(
            jnp.array(0), variables["params"], variables["batch_stats"], tx.init(variables["params"])
        )

    batch = {
        "image": jax.ShapeDtypeStruct((number, 2, 64, 64, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((number, 2, 64, 64), jnp.uint8),
    }
    lowered = step.lower(jax.eval_shape(start), batch, jax.eval_shape(lambda: jax.random.key(0)))
    assert ("all_reduce" in lowered.as_text()) == waits
