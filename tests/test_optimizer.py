"""Which parameters move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg.optimizer import make_optimizer, make_schedule, parameter_labels

PARAMS = {
    "encoder": {"conv": {"kernel": jnp.ones((2, 3))}, "bn": {"bias": jnp.zeros(3)}},
    "decoder": {"w": jnp.ones(4)},
}


def test_every_parameter_has_a_label():
    labels = parameter_labels(PARAMS, freeze_encoder=True)
    assert labels == {"encoder": {"conv": {"kernel": "frozen"}, "bn": {"bias": "frozen"}}, "decoder": {"w": "train"}}
    assert set(jax.tree.leaves(parameter_labels(PARAMS, freeze_encoder=False))) == {"train"}
    labels = parameter_labels(PARAMS, freeze_encoder=False, own_rate=True)
    assert labels == {"encoder": {"conv": {"kernel": "encoder"}, "bn": {"bias": "encoder"}}, "decoder": {"w": "train"}}
    # Only what is called so is the encoder.
    assert parameter_labels({"encoders": 0, "neck": 0}, freeze_encoder=True) == {"encoders": "train", "neck": "train"}


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_parameters_do_not_move_and_take_no_memory(freeze):
    tx = make_optimizer(0.1, freeze)
    state, params = tx.init(PARAMS), PARAMS
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    moved = {part: bool(jnp.any(params[part][name] != PARAMS[part][name])) for part, name in [("decoder", "w")]}
    assert moved == {"decoder": True}
    encoder_moved = [
        bool(jnp.any(a != b))
        for a, b in zip(*map(jax.tree.leaves, (params["encoder"], PARAMS["encoder"])), strict=True)
    ]
    assert encoder_moved == [not freeze] * 2
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * (4 if freeze else 4 + 6 + 3)


@pytest.mark.parametrize("b2", [None, 0.9])
def test_steps_equal_pytorchs_adam(b2):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    theirs = torch.nn.Parameter(torch.ones(4))
    adam = torch.optim.Adam([theirs], 1e-2, betas=(0.9, b2 or 0.999))
    tx = make_optimizer(1e-2, True, *([b2] if b2 else []))
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(5):
        gradient = np.random.default_rng(step).normal(size=4).astype(np.float32)
        grads = jax.tree.map(jnp.ones_like, PARAMS) | {"decoder": {"w": jnp.array(gradient)}}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(gradient)
        adam.step()
    np.testing.assert_allclose(params["decoder"]["w"], theirs.detach().numpy(), rtol=1e-6)


def test_an_encoder_of_its_own_rate_moves_as_pytorchs_group_of_that_rate_does():
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    names = ("encoder", "decoder")
    theirs = {name: torch.nn.Parameter(torch.ones(4)) for name in names}
    groups = [{"params": [theirs["encoder"]], "lr": 1e-3}, {"params": [theirs["decoder"]]}]
    adam = torch.optim.Adam(groups, 1e-2)
    params = {name: jnp.ones(4) for name in names}
    tx = make_optimizer(optax.constant_schedule(1e-2), False, encoder_rate=0.1)
    state = tx.init(params)
    for step in range(5):
        gradients = dict(zip(names, np.random.default_rng(step).normal(size=(2, 4)).astype(np.float32), strict=True))
        updates, state = tx.update({name: jnp.array(value) for name, value in gradients.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for name, gradient in gradients.items():
            theirs[name].grad = torch.tensor(gradient)
        adam.step()
    for name in names:
        np.testing.assert_allclose(params[name], theirs[name].detach().numpy(), rtol=1e-6)
    # With the encoder frozen there is nothing that the rate could be of.
    frozen = make_optimizer(1e-2, True, encoder_rate=0.1)
    updates, _ = frozen.update(params, frozen.init(params), params)
    assert not updates["encoder"].any() and updates["decoder"].all()


def test_schedules():
    assert make_schedule("constant", 0.5, 10)(7) == 0.5
    # 2 of 50 steps lead up, 48 down: half of the height is reached half-way down.
    cosine = make_schedule("cosine", 0.5, 50)
    rates = [cosine(step) for step in (0, 1, 2, 14, 26, 50)]
    np.testing.assert_allclose(rates, [0.25, 0.375, 0.5, 0.25 + 0.25 * 0.5**0.5, 0.25, 0], atol=1e-7)
    assert np.all(np.diff([cosine(step) for step in range(2, 51)]) < 0)
    assert make_schedule("cosine", 0.5, 1)(0) == 0.5
    # A twentieth: 39 steps have one that leads up, and so the highest rate at once; 40 have two.
    assert [make_schedule("cosine", 0.5, steps)(0) for steps in (39, 40)] == [0.5, 0.25]
    assert make_schedule("cosine", 0.5, 1)(2) == make_schedule("cosine", 0.5, 2)(2) == 0
    for name in ("warm", "", "convex"):
        with pytest.raises(ValueError, match="constant or cosine"):
            make_schedule(name, 0.5, 10)
