"""The steps and the loop, on a small segmenter that has all the parts: batch norm, a frozen half, ignored pixels."""

import functools

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxseg import checkpoint, metrics, train
from jaxseg.cpu import compiler_options
from jaxseg.data import loader
from jaxseg.decoders import BaselineDecoder, ImprovedDecoder
from jaxseg.layers import BatchNorm
from jaxseg.optimizer import make_optimizer
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

NUM_CLASSES = 3


class SmallEncoder(nn.Module):
    """One strided convolution with batch norm, in the place of a ResNet."""

    axis_name: str | None = train.AXIS

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (32, 32), strides=32, use_bias=False)(x)
        return {32: nn.relu(BatchNorm(not train, axis_name=self.axis_name)(x))}


MODEL = Segmenter(SmallEncoder(), BaselineDecoder(NUM_CLASSES, widths=(8, 8, 8, 8, 8)))
DEVICES = jax.local_devices()
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))


def make_batch(seed, number=8, size=(32, 64), label_size=None):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (number, *size, 3), dtype=np.uint8)
    label = rng.integers(0, NUM_CLASSES, (number, *(label_size or size))).astype(np.uint8)
    # The later the image, the more of it is ignored; the first is ignored whole.
    for index in range(number):
        label[index][rng.random(label.shape[1:]) < index / number] = 255
    label[0] = 255
    return {"image": image, "label": label}


def make_stage(freeze, epochs=1):
    return train.Stage("a stage", epochs, 1e-2, freeze)


def take_steps(variables, freeze, devices, steps=3, model=MODEL, max_degrees=0.0, learning_rate=1e-2):
    tx = make_optimizer(learning_rate, freeze)
    state = train.start_stage(variables, tx, devices)
    step_fn = functools.partial(
        train.train_step, model=model, tx=tx, freeze_encoder=freeze, max_degrees=max_degrees, axis_name=train.AXIS
    )
    step_fn = train.pmap_step(step_fn, devices, donate=True, keyed=True)
    losses, key = [], train.replicate(KEY, devices)
    for batch in train.batches_on_devices([make_batch(seed) for seed in range(steps)], devices):
        state, metric = step_fn(state, batch, key)
        losses.append(float(metric["loss"]))
    return state, losses


@pytest.mark.parametrize("freeze", [True, False])
def test_four_devices_equal_one_after_three_steps(variables, freeze):
    one, one_losses = take_steps(variables, freeze, DEVICES[:1])
    four, four_losses = take_steps(variables, freeze, DEVICES)
    np.testing.assert_allclose(one_losses, four_losses, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one.params, four.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one.batch_stats, four.batch_stats)
    assert int(four.step) == 3


IMPROVED = Segmenter(
    SmallEncoder(), ImprovedDecoder(NUM_CLASSES, widths=(8, 8, 8, 8, 8), dropout_rate=0.3, axis_name=train.AXIS)
)


@pytest.fixture(scope="module")
def improved_variables():
    return jax.jit(IMPROVED.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3), jnp.uint8))


@pytest.mark.parametrize("freeze", [True, False])
def test_the_improved_model_is_the_same_on_one_two_and_four_devices(improved_variables, freeze, request):
    if not freeze:
        request.getfixturevalue("optimised")
    options = {"steps": 20, "model": IMPROVED, "max_degrees": 30.0, "learning_rate": 3e-4}
    batches = [eval_batch(0, [(32, 64), (120, 160), (150, 175)], (150, 175))]

    def count(state, devices):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return train.make_evaluate(IMPROVED, NUM_CLASSES, devices)(variables, batches)

    one, one_losses = take_steps(improved_variables, freeze, DEVICES[:1], **options)
    confusion = None if freeze else count(one, DEVICES[:1])
    for number in (2, 4):
        other, losses = take_steps(improved_variables, freeze, DEVICES[:number], **options)
        np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, (other.params, other.batch_stats), (one.params, one.batch_stats))
        # A pixel that is taken for another class changes two cells.
        assert freeze or np.abs(count(other, DEVICES[:number]) - confusion).sum() / 2 <= 1e-5 * confusion.sum()


def test_the_keys_of_a_batch_differ_by_image_and_by_step():
    keys = jax.random.key_data(jnp.stack([train.image_keys(KEY, step, 4) for step in range(3)])).reshape(12, -1)
    assert len({tuple(key) for key in keys.tolist()}) == 12
    split = jax.pmap(lambda _: jax.random.key_data(train.image_keys(KEY, 1, 2, train.AXIS)), train.AXIS)
    np.testing.assert_array_equal(split(np.zeros(2)).reshape(4, -1), keys[4:8])


def test_whatever_is_drawn_follows_the_key(improved_variables):
    tx = make_optimizer(3e-4, True)
    (batch,) = train.batches_on_devices([make_batch(0)], DEVICES[:1])

    def losses(keys, **options):
        step = functools.partial(train.train_step, model=IMPROVED, tx=tx, freeze_encoder=True, axis_name=train.AXIS)
        step = train.pmap_step(functools.partial(step, **options), DEVICES[:1], donate=True, keyed=True)
        states = (train.start_stage(improved_variables, tx, DEVICES[:1]) for _ in keys)
        keys = (train.replicate(jax.random.key(key), DEVICES[:1]) for key in keys)
        return [float(step(state, batch, key)[1]["loss"]) for state, key in zip(states, keys, strict=True)]

    found = {*losses((0, 1))}
    for options in ({"max_degrees": 30.0}, {"flip": True}, {"jitter": (0.4, 0.4, 0.4, 0.1)}):
        first, second, again = losses((0, 1, 0), **options)
        assert first == again
        found |= {first, second}
    assert len(found) == 8


def test_stage_one_moves_neither_the_encoder_nor_its_statistics(variables):
    state, _ = take_steps(variables, True, DEVICES)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], variables["params"]["encoder"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, variables["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params["decoder"], variables["params"]["decoder"])
    assert all(jax.tree.leaves(moved))


def test_a_stages_class_weights_reach_the_loss(variables):
    weights, batch, tx = np.array([0.5, 4.0, 1.5]), make_batch(0), make_optimizer(1e-2, True)
    stage = train.Stage("a stage", 1, 1e-2, True, class_weights=tuple(weights.tolist()))
    state = train.start_stage(variables, tx, DEVICES)
    done, *_ = train.run_stage(MODEL, tx, state, stage, KEY, [batch], 1, evaluate, DEVICES)
    # Nothing of the frozen encoder and of this decoder depends on whether it trains.
    log_softmax = jax.nn.log_softmax(MODEL.apply(variables, batch["image"]))
    valid = batch["label"] != 255
    label = batch["label"][valid]
    own = np.asarray(log_softmax)[valid][np.arange(len(label)), label]
    np.testing.assert_allclose(done.loss, -(weights[label] * own).sum() / weights[label].sum(), rtol=1e-5)


@pytest.mark.parametrize("devices", [DEVICES[:1], DEVICES])
def test_features_computed_before_make_the_same_steps(variables, devices):
    tx, batches = make_optimizer(1e-2, True), [make_batch(seed) for seed in range(3)]
    encoded = list(train.make_encode(MODEL, devices)(train.replicate(variables, devices), batches))
    stored = [{"features": x, "label": batch["label"]} for x, batch in zip(encoded, batches, strict=True)]
    ends = [
        list(
            train.run_stage(
                MODEL, tx, train.start_stage(variables, tx, devices), make_stage(True), KEY, given, 3, evaluate, devices
            )
        )
        for given in (batches, stored)
    ]
    losses = [[event.loss for event in events if isinstance(event, train.StepDone)] for events in ends]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, *(jax.tree.map(np.array, events[-1].state) for events in ends))
    equal(ends[1][-1].state.params["encoder"], variables["params"]["encoder"])
    equal(ends[1][-1].state.batch_stats, variables["batch_stats"])


def test_stage_two_moves_every_parameter_and_statistic(variables):
    state, _ = take_steps(variables, False, DEVICES)
    for after, before in ((state.params, variables["params"]), (state.batch_stats, variables["batch_stats"])):
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), after, before)))


def test_a_stage_leaves_the_callers_variables_alone(variables):
    before = jax.tree.map(np.array, variables)
    take_steps(variables, False, DEVICES[:1])
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_stage_one_spends_no_time_on_the_encoders_backward_pass():
    model = Segmenter(ResNet(), BaselineDecoder(9))
    image, label = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 64, 64), np.uint8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)

    def flops(step, *args):
        return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]

    def step_flops(freeze):
        tx = make_optimizer(1e-3, freeze)
        params = shapes["params"]
        opt_state = jax.eval_shape(tx.init, params)
        state = train.TrainState(jnp.array(0), params, shapes["batch_stats"], opt_state)
        step = functools.partial(train.train_step, model=model, tx=tx, freeze_encoder=freeze)
        return flops(step, state, {"image": image, "label": label}, jax.random.key(0))

    encoder = {name: tree["encoder"] for name, tree in shapes.items()}
    forward = flops(ResNet().apply, encoder, image.astype(np.float32))
    frozen, everything = step_flops(True), step_flops(False)
    # A backward pass costs about twice the forward pass; stage one must not contain any of the encoder's.
    assert everything - frozen > 1.7 * forward
    assert frozen < 0.6 * everything


def evaluate(_):
    return np.eye(NUM_CLASSES, dtype=np.int64)


def run_stage(variables, freeze, epochs, steps, devices=DEVICES, evaluate=evaluate, **options):
    tx = make_optimizer(1e-2, freeze)
    state = train.start_stage(variables, tx, devices)
    batches = (make_batch(seed) for seed in range(epochs * steps))
    return train.run_stage(
        MODEL, tx, state, make_stage(freeze, epochs), KEY, batches, steps, evaluate, devices, **options
    )


@pytest.mark.parametrize("freeze", [True, False])
def test_only_the_program_of_a_whole_backward_pass_is_loaded_anew(variables, freeze, monkeypatch):
    loaded = []
    monkeypatch.setattr(train, "reloaded", lambda step, devices: loaded.append(step) or step)
    assert list(run_stage(variables, freeze, 1, 1, DEVICES[:1]))
    assert len(loaded) == (not freeze)


@pytest.mark.parametrize(("freeze", "devices"), [(True, DEVICES), (False, DEVICES), (False, DEVICES[:1])])
def test_the_loop_compiles_each_step_once(variables, freeze, devices):
    compiled = []
    eval_batches = [{**make_batch(9), "label_size": np.full((8, 2), (32, 64), np.int32)}] * 2
    evaluate = functools.partial(train.make_evaluate(MODEL, NUM_CLASSES, devices), batches=eval_batches)
    events = run_stage(variables, freeze, 3, 4, devices, evaluate)

    def count(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        at_epoch_end = [len(compiled) for event in events if isinstance(event, train.EpochDone)]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    # The training step and the evaluation step in the first epoch, nothing after it.
    assert at_epoch_end == [2, 2, 2]


def test_a_step_is_compiled_with_the_options(monkeypatch):
    jit, asked = jax.jit, []
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: asked.append(kwargs) or jit(*args, **kwargs))
    train.pmap_step(lambda state, batch: state, DEVICES[:1])
    (kwargs,) = (kwargs for kwargs in asked if "donate_argnums" in kwargs)
    assert kwargs["compiler_options"] == compiler_options()


def test_the_loop_tells_every_step_and_epoch_in_order(variables):
    events = list(run_stage(variables, False, 2, 3))
    kinds = [(type(event).__name__, event.epoch, event.step) for event in events]
    steps = [("StepDone", epoch, 3 * (epoch - 1) + step) for epoch in (1, 2) for step in (1, 2, 3)]
    assert kinds == [*steps[:3], ("EpochDone", 1, 3), *steps[3:], ("EpochDone", 2, 6)]
    assert events[-1].mean_iou == 1


def equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, tree), jax.tree.map(np.array, other))


@pytest.mark.parametrize("made", [1, 5])
def test_a_state_from_halfway_goes_on_to_the_same_end(variables, made):
    epochs, steps = 2, 3
    *_, end = run_stage(variables, False, epochs, steps)
    for event in run_stage(variables, False, epochs, steps, wants_state=lambda: True):
        if isinstance(event, train.Halfway) and (event.epoch - 1) * steps + event.updates == made:
            saved, place = jax.tree.map(np.array, event.state), (event.epoch, event.updates)
            break
    assert saved.step == made and place == (1 + made // steps, made % steps)
    batches = [make_batch(seed) for seed in range(made, epochs * steps)]
    state = train.replicate(saved, DEVICES)
    stage, tx = make_stage(False, epochs), make_optimizer(1e-2, False)
    *_, other = train.run_stage(MODEL, tx, state, stage, KEY, batches, steps, evaluate, DEVICES, start=place)
    assert (other.epoch, other.step) == (epochs, end.step)
    equal(other.state, end.state)


def loader_batches(start=0):
    """Shuffled batches of a source that has ignored pixels, those of four updates an epoch."""
    images = [make_batch(seed, 1) for seed in range(32)]
    source = [{name: array[0] for name, array in image.items()} for image in images]
    return loader.train_batches(source, image_size=(32, 64), batch_size=8, seed=3, start=start, scale_range=(0.5, 2.0))


def train_to(state, devices, batches, start=(1, 0), until=None):
    """Trains for two epochs of the improved model, or up to `until` = (epoch, updates); returns losses and state."""
    stage = train.Stage("a stage", 2, 3e-4, False, max_degrees=30.0, flip=True, jitter=(0.4, 0.4, 0.4, 0.1))
    tx, losses = make_optimizer(3e-4, False), []
    events = train.run_stage(
        IMPROVED, tx, state, stage, KEY, batches, 4, evaluate, devices, start=start, wants_state=lambda: bool(until)
    )
    for event in events:
        if isinstance(event, train.StepDone):
            losses.append(event.loss)
        elif until in (None, (event.epoch, getattr(event, "updates", None))):
            end = event.state
            if until:
                break
    return losses, end


@pytest.mark.parametrize("numbers", [(4, 1), (1, 4)])
def test_a_checkpoint_goes_on_with_another_number_of_devices(improved_variables, tmp_path, numbers):
    before, after = (DEVICES[:number] for number in numbers)
    state = train.start_stage(improved_variables, make_optimizer(3e-4, False), before)
    losses, halfway = train_to(state, before, loader_batches(), until=(2, 1))
    with checkpoint.open_checkpoints(tmp_path) as manager:
        checkpoint.save(manager, halfway, None, {})
        template = train.start_stage(improved_variables, make_optimizer(3e-4, False), after)
        restored = checkpoint.restore_state(manager, checkpoint.LAST, template)
    equal(restored, halfway)
    more, end = train_to(train.replicate(restored, after), after, loader_batches(5), start=(2, 1))
    state = train.start_stage(improved_variables, make_optimizer(3e-4, False), after)
    expected_losses, expected = train_to(state, after, loader_batches())
    assert int(end.step) == int(expected.step) == 8
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(losses + more, expected_losses)
    jax.tree.map(close, jax.tree.map(np.array, end), jax.tree.map(np.array, expected))


def test_two_runs_of_one_seed_are_bit_equal(improved_variables):
    def one():
        state = train.start_stage(improved_variables, make_optimizer(3e-4, False), DEVICES)
        return train_to(state, DEVICES, loader_batches())

    (losses, state), (other_losses, other) = one(), one()
    assert losses == other_losses
    equal(state, other)


def test_a_validation_that_broke_off_is_made_up_for(variables):
    *_, end = run_stage(variables, True, 1, 2)
    *_, halfway = run_stage(variables, True, 1, 2, evaluate=lambda _: None)
    assert isinstance(halfway, train.Halfway) and (halfway.epoch, halfway.updates) == (1, 2)
    tx = make_optimizer(1e-2, True)
    resumed = train.run_stage(MODEL, tx, halfway.state, make_stage(True), KEY, [], 2, evaluate, DEVICES, start=(1, 2))
    (done,) = resumed
    assert (done.epoch, done.step) == (1, 2)
    equal(done.state, end.state)


def test_debugging_computes_the_same_and_names_the_operation(variables):
    *_, end = run_stage(variables, False, 1, 2)
    with jax.debug_nans(True):
        *_, other = run_stage(variables, False, 1, 2)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, jax.tree.map(np.array, end.state), jax.tree.map(np.array, other.state))
        bad = {**variables, "params": jax.tree.map(lambda x: x.at[...].set(np.inf), variables["params"])}
        with pytest.raises(FloatingPointError, match="encountered in conv_general_dilated"):
            list(run_stage(bad, False, 1, 1))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_debugging_finds_what_goes_wrong_later(num_devices):
    devices = DEVICES[:num_devices]

    def step(state, batch):
        return state, {"loss": jax.lax.psum(jnp.log(state * batch["x"].mean()), train.AXIS)}

    with jax.debug_nans(True):
        step_fn = train.pmap_step(step, devices)
        batch = {"x": jnp.ones((num_devices, 3))}
        for _ in range(3):
            assert step_fn(jnp.array(1.0), batch)[1]["loss"] == 0
        with pytest.raises(FloatingPointError, match="encountered in log"):
            step_fn(jnp.array(-1.0), batch)


def test_a_loss_that_is_not_finite_names_the_images(variables):
    tx = make_optimizer(1e-2, True)
    broken = {
        "params": jax.tree.map(lambda x: x * jnp.nan, variables["params"]),
        "batch_stats": variables["batch_stats"],
    }
    state = train.start_stage(broken, tx, DEVICES)
    batches = [{**make_batch(seed), "index": np.arange(8) + 8 * seed} for seed in range(6)]
    events = train.run_stage(MODEL, tx, state, make_stage(True), KEY, batches, 6, evaluate, DEVICES)
    with pytest.raises(train.NonFiniteLossError, match="nan at step 1") as caught:
        list(events)
    assert caught.value.step == 1
    np.testing.assert_array_equal(caught.value.index, np.arange(8))


def test_metrics_are_read_late(variables, monkeypatch):
    started, read = [], []

    class Loss:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            read.append((self.step, len(started)))
            return 1.0

    def step_fn(state, batch, key):
        started.append(batch)
        return state, {"loss": Loss(len(started))}

    monkeypatch.setattr(train, "pmap_step", lambda *args, **kwargs: step_fn)
    list(run_stage(variables, False, 1, 6))
    # Each loss but the last ones of the epoch is read after two more steps were started.
    assert [(step, seen - step) for step, seen in read] == [(1, 2), (2, 2), (3, 2), (4, 2), (5, 1), (6, 0)]


def eval_batch(seed, sizes, canvas, number=8):
    batch = make_batch(seed, number, label_size=canvas)
    batch["label_size"] = np.array([sizes[index % len(sizes)] for index in range(number)], np.int32)
    for index, (height, width) in enumerate(batch["label_size"]):
        batch["label"][index, height:] = 255
        batch["label"][index, :, width:] = 255
    return batch


@pytest.mark.parametrize("at_once", [1, 2**23, 90 * NUM_CLASSES * 16])
def test_predictions_equal_pytorchs_interpolation(variables, monkeypatch, at_once):
    # Whole images, rows one by one, and blocks of 16 rows of which the last is cut.
    monkeypatch.setattr(train, "_ENLARGED_AT_ONCE", at_once)
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    batch = eval_batch(0, [(32, 64), (50, 75), (70, 33), (20, 90)], (70, 90))
    prediction = jax.jit(functools.partial(train.predict_step, model=MODEL))(variables, batch)
    logits = np.asarray(MODEL.apply(variables, batch["image"]))
    different = total = 0
    for index, (height, width) in enumerate(batch["label_size"].tolist()):
        enlarged = torch.nn.functional.interpolate(
            torch.tensor(logits[index]).permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False
        )
        different += (prediction[index, :height, :width] != enlarged[0].argmax(0).numpy()).sum()
        total += height * width
    # Two logits may be equal to the last bit or two.
    assert different <= 1e-3 * total


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_evaluation_sums_every_counted_pixel(variables, num_devices):
    batches = [eval_batch(seed, [(32, 64), (50, 75)], (50, 75)) for seed in range(3)]
    devices = DEVICES[:num_devices]
    total = train.make_evaluate(MODEL, NUM_CLASSES, devices)(train.replicate(variables, devices), batches)
    assert total.dtype == np.int64
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for batch in batches:
        prediction = np.asarray(train.predict_step(variables, batch, model=MODEL))
        expected += metrics.confusion_matrix(batch["label"], prediction, NUM_CLASSES)
    assert total.sum() == sum((batch["label"] != 255).sum() for batch in batches)
    # A pixel that is taken for another class changes two cells.
    assert np.abs(total - expected).sum() / 2 <= 1e-5 * total.sum()


def test_batches_are_split_in_order_and_kept_ahead():
    pulled = []

    def source():
        for seed in range(5):
            pulled.append(seed)
            yield make_batch(seed)

    batches = train.batches_on_devices(source(), DEVICES, ahead=2)
    first = next(batches)
    assert pulled == [0, 1, 2]
    assert first["image"].shape == (4, 2, 32, 64, 3)
    np.testing.assert_array_equal(np.asarray(first["label"]).reshape(8, 32, 64), make_batch(0)["label"])
    assert len(list(batches)) == 4
