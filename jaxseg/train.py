"""The state, the pmapped steps, and the loop over the epochs of a stage."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxseg.augment import random_flip, random_jitter, random_rotate
from jaxseg.boundary import boundary_confusion, boundary_width
from jaxseg.cpu import compiler_options
from jaxseg.devices import mean_over_devices
from jaxseg.enlarge import enlarge
from jaxseg.losses import pixel_cross_entropy
from jaxseg.memory import reloaded
from jaxseg.metrics import confusion_matrix, mean_iou

AXIS = "batch"
# Of brightness, contrast, saturation and hue.
NO_JITTER = (0.0, 0.0, 0.0, 0.0)
# A metric is read this many steps after it was computed, so that the device always has work queued.
LAG = 2
# Logits are enlarged this many at a time (32 MiB), so that a photograph of any size can be evaluated.
_ENLARGED_AT_ONCE = 2**23

Batch = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: () int32, the updates made so far, over all stages.
      params: {'encoder': ..., 'decoder': ...} float32.
      batch_stats: the running statistics of batch norm, float32.
      opt_state: the optimizer's memory; its structure belongs to one stage.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of training does.

    Attributes:
      name: for people, such as 'stage 1: encoder frozen'.
      epochs: passes over the training split.
      learning_rate: Adam's step size, or its highest value under a schedule.
      freeze_encoder: neither the encoder's parameters nor its batch statistics move.
      schedule: 'constant' or 'cosine'; see `jaxseg.optimizer.make_schedule`.
      max_degrees: each image is rotated by an angle drawn up to it, in either direction.
      flip: each image is mirrored in half of the draws.
      jitter: how far each image's brightness, contrast, saturation and hue are changed; see `random_jitter`.
      encoder_rate: the encoder's learning rate, while it trains, as a share of `learning_rate`.
      class_weights: how much each class's pixels count in the loss; see `pixel_cross_entropy`.
    """

    name: str
    epochs: int
    learning_rate: float
    freeze_encoder: bool
    schedule: str = "constant"
    max_degrees: float = 0.0
    flip: bool = False
    jitter: tuple[float, float, float, float] = NO_JITTER
    encoder_rate: float = 1.0
    class_weights: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class StepDone:
    """One update: its global number, the loss in nats, and the batch's places in the training split, if known."""

    epoch: int
    step: int
    loss: float
    index: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class EpochDone:
    """One validated epoch: the (C, C) int64 confusion matrix, its mean IoU, and the state (then donated)."""

    epoch: int
    step: int
    confusion: np.ndarray
    mean_iou: float
    state: TrainState


@dataclasses.dataclass(frozen=True)
class Halfway:
    """The state (then donated) after `updates` updates of an epoch that is not validated yet, as it was asked for."""

    epoch: int
    updates: int
    state: TrainState


class NonFiniteLossError(FloatingPointError):
    """The loss is not a number, or infinite: at which global step, and the batch's places in the training split."""

    def __init__(self, loss: float, step: int, index: np.ndarray | None):
        super().__init__(f"the loss is {loss} at step {step}")
        self.step, self.index = step, index


def image_keys(key: jax.Array, step: jax.Array, number: int, axis_name: str | None = None) -> jax.Array:
    """A key for each image of a batch: a function of the step and the image's place in the global batch.

    Args:
      key: the run's.
      step: () integer, the updates made before.
      number: the images of this device.
      axis_name: the pmap axis, or None. The device only tells which part of the batch it has.

    Returns:
      (number,) keys.
    """
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * number
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), first + jnp.arange(number))


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    freeze_encoder: bool,
    max_degrees: float = 0.0,
    flip: bool = False,
    jitter: tuple[float, float, float, float] = NO_JITTER,
    class_weights: tuple[float, ...] | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update by one batch, or by one device's part of it.

    Args:
      state: the state before.
      batch: 'image' (N, H, W, 3) uint8, 'label' (N, H, W) integer; other entries are ignored. With 'features', what
        `encode_step` gave for the images, in the image's place, only the decoder is computed: for a frozen encoder and
        images that nothing changes.
      key: the run's, the same for all steps; see `image_keys`.
      model: the segmenter; its batch norm must average over the same `axis_name`.
      tx: the stage's optimizer, that of `state.opt_state`.
      freeze_encoder: the encoder's batch norm uses, and keeps, its running statistics, and no gradient reaches it: its
        backward pass is never computed. `tx` must freeze its parameters.
      max_degrees: see `jaxseg.augment.random_rotate`; with 0 no image is touched.
      flip: whether `jaxseg.augment.random_flip` is applied.
      jitter: see `jaxseg.augment.random_jitter`; with zeros no image is touched.
      class_weights: see `pixel_cross_entropy`.
      axis_name: the pmap axis, or None.

    Returns:
      The state after, and {'loss': () float32}, both of the global batch and equal on all devices.
    """
    image: Any = batch.get("image")
    label = batch["label"]
    keys = image_keys(key, state.step, len(label), axis_name)
    for_rotation, for_dropout, for_flip, for_jitter = (
        jax.vmap(jax.random.fold_in, (0, None))(keys, use) for use in range(4)
    )
    if flip:
        image, label = jax.vmap(random_flip)(for_flip, image, label)
    # Before the rotation, which reveals corners of the mean colour.
    if any(jitter):
        image = jax.vmap(random_jitter, (0, 0, None))(for_jitter, image, jitter)
    if max_degrees:
        image, label = jax.vmap(random_rotate, (0, 0, 0, None))(for_rotation, image, label, max_degrees)

    features = batch.get("features")
    # Not within what is differentiated: what a frozen encoder gives is a constant.
    if freeze_encoder and features is None:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        features = encode_step(variables, {"image": image}, model=model)

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        options: dict[str, Any] = {"train": True, "keys": for_dropout, "mutable": ["batch_stats"]}
        if features is None:
            logits, updates = model.apply(variables, image, **options)
        else:
            logits, updates = model.apply(variables, features, label.shape[1:], method="decode", **options)
        loss = pixel_cross_entropy(logits, label, axis_name=axis_name, class_weights=class_weights)
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    loss, grads = mean_over_devices((loss, grads), axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), {"loss": loss}


def encode_step(variables: Any, batch: Batch, *, model: nn.Module) -> jax.Array:
    """What a frozen encoder gives for batch['image'] (N, H, W, 3) uint8: (N, ceil(H / 32), ceil(W / 32), C)."""
    features: Any = model.apply(variables, batch["image"], method="encode")
    return features


def predict_step(variables: Any, batch: Batch, *, model: nn.Module, native: bool = False) -> jax.Array:
    """Classifies every pixel at its label's own size.

    The logits are enlarged bilinearly (see `jaxseg.enlarge`), each image's to its own `label_size`, in the corner of a
    canvas that all share: so labels of many sizes take one compilation.

    Args:
      variables: {'params', 'batch_stats'}.
      batch: 'image' (N, H, W, 3) uint8; 'label' (N, HC, WC), whose shape is the canvas; 'label_size' (N, 2) int32.
      model: the segmenter.
      native: images are not resized, but lie, as large as their labels, in the corner of that canvas: nothing is
        enlarged, and what is beyond them is padding.

    Returns:
      (N, HC, WC) int32 class indices; outside an image's own size they mean nothing.
    """
    logits: Any
    if native:
        logits = model.apply(variables, batch["image"], size=batch["label_size"])
        return logits.argmax(-1).astype(jnp.int32)
    logits = model.apply(variables, batch["image"])
    height, width = batch["label"].shape[1:]
    rows = max(min(_ENLARGED_AT_ONCE // (width * logits.shape[-1]), height), 1)
    block = (rows, width)

    def classify(logits_and_size: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits, own_size = logits_and_size

        def classify_rows(first: jax.Array) -> jax.Array:
            enlarged = enlarge(logits, jnp.array(logits.shape[:2]), own_size, jnp.stack([first, 0]), block)
            return enlarged.argmax(-1).astype(jnp.int32)

        blocks = jax.lax.map(classify_rows, jnp.arange(0, height, rows))
        return blocks.reshape(-1, width)[:height]

    # One image at a time, and of a large one some rows: the enlarged logits are many times larger than all else.
    return jax.lax.map(classify, (logits, batch["label_size"]))


def eval_step(
    variables: Any,
    batch: Batch,
    *,
    model: nn.Module,
    num_classes: int,
    native: bool = False,
    boundary: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """The confusion matrix (C, C) int32 of one batch, summed over the devices; arguments as `predict_step`'s.

    With `boundary` it is that of `boundary_confusion`, (2C, 2C), and the batch has 'boundary_width' (N,) int32, too.
    """
    prediction = predict_step(variables, batch, model=model, native=native)
    if boundary:
        confusion = boundary_confusion(batch["label"], prediction, batch["boundary_width"], num_classes)
    else:
        confusion = confusion_matrix(batch["label"], prediction, num_classes)
    return confusion if axis_name is None else jax.lax.psum(confusion, axis_name)


def pmap_step(
    step: Callable,
    devices: Sequence[jax.Device],
    *,
    donate: bool = False,
    compact: bool = False,
    per_image: bool = False,
    keyed: bool = False,
) -> Callable:
    """Compiles `step(state, batch)` for all devices: the state replicated, without an axis of its own, the batch split.

    Args:
      step: a pure function whose outputs are equal on all devices, or, with `per_image`, one entry per image.
      devices: those of all processes that call it, process after process, and of each process equally many.
      donate: the state's buffers are reused for the output; the caller's state is gone.
      compact: on CPUs the program is loaded anew once it is compiled, so that it takes less memory, and the step's
        arguments must always have the same shapes and dtypes: see `jaxseg.memory.reloaded`. It takes a second, and
        saves 100 MiB where everything trains, 14 to 28 with a frozen encoder.
      per_image: outputs keep the leading axes (devices, images per device).
      keyed: the step is `step(state, batch, key)`, the key the same on all devices.

    One process compiles it with `jaxseg.cpu.compiler_options`; of several, JAX takes none.

    Under `jax.debug_nans` the first device computes the parts of all, which gives the same: of a pmap, JAX cannot tell
    the operation that gave the first NaN.
    """
    in_axes = (None, 0, None) if keyed else (None, 0)
    if jax.config.jax_debug_nans:  # type: ignore[attr-defined]  # JAX adds its options when it is imported
        together = jax.jit(jax.vmap(step, in_axes, axis_name=AXIS), compiler_options=compiler_options())

        def on_one_device(*arguments: Any) -> Any:
            outputs = together(*jax.device_put(arguments, devices[0]))
            return outputs if per_image else jax.tree.map(lambda x: x[0], outputs)

        return on_one_device
    out_axes = 0 if per_image else None
    donated = 0 if donate else ()
    mapped = jax.pmap(step, AXIS, in_axes=in_axes, out_axes=out_axes, devices=devices, donate_argnums=donated)
    # With several processes a pmap converts its arrays on the host, which no jit around it can trace.
    if jax.process_count() > 1:
        return mapped

    # A function of ours, with the step's name for logs and kept programs: jit would hand on pmap's own `lower`, which
    # knows no options, and keeps what it lowered as long as the step is held.
    def call(*arguments: Any) -> Any:
        return mapped(*arguments)

    call.__name__ = getattr(getattr(step, "func", step), "__name__", "step")
    jitted = jax.jit(call, donate_argnums=donated, compiler_options=compiler_options())
    is_compiled = devices[0].platform == "cpu" and not jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return reloaded(jitted, devices) if compact and is_compiled else jitted


def all_devices() -> tuple[jax.Device, ...]:
    """The devices of all processes, process after process: so lie the parts of a batch that the processes read."""
    return tuple(sorted(jax.devices(), key=lambda device: device.process_index))


def local_devices(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those devices that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies every array of `tree` to all of this process' devices, without an added axis.

    With an axis each step compiles twice. Of several processes each copies its own `tree`: they must be equal.
    """
    mesh = Mesh(np.array(local_devices(devices)), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def batches_on_devices(batches: Iterable[Batch], devices: Sequence[jax.Device], ahead: int = 2) -> Iterator[Batch]:
    """Splits each batch over the devices, (N, ...) -> (devices, N / devices, ...), and puts it there ahead of its use.

    Args:
      batches: host batches of arrays whose first axis the devices divide; of several processes each has its own part.
      devices: the devices of all processes; used are those of this one.
      ahead: how many batches are under way to the devices.
    """
    devices = local_devices(devices)
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))
    queue: collections.deque[Batch] = collections.deque()
    for batch in batches:
        split = {name: x.reshape(len(devices), -1, *x.shape[1:]) for name, x in batch.items()}
        queue.append(jax.device_put(split, sharding))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def start_stage(
    variables: Any, tx: optax.GradientTransformation, devices: Sequence[jax.Device], step: int = 0
) -> TrainState:
    """The first state of a stage.

    Args:
      variables: {'params', 'batch_stats'} to start from; copied, because the first update donates the state's buffers.
      tx: the stage's optimizer.
      devices: where the state goes.
      step: the updates made before the stage.
    """

    # Jitted as one: operation by operation JAX would compile a program for each operation and shape, some thirty.
    @jax.jit
    def begin(variables: Any, step: jax.Array) -> TrainState:
        params, batch_stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
        return TrainState(step, params, batch_stats, tx.init(params))

    return replicate(begin(variables, jnp.array(step, jnp.int32)), devices)


def run_stage(
    model: nn.Module,
    tx: optax.GradientTransformation,
    state: TrainState,
    stage: Stage,
    key: jax.Array,
    train_batches: Iterable[Batch],
    steps_per_epoch: int,
    evaluate: Callable[[Any], np.ndarray | None],
    devices: Sequence[jax.Device],
    start: tuple[int, int] = (1, 0),
    wants_state: Callable[[], bool] = lambda: False,
) -> Iterator[StepDone | EpochDone | Halfway]:
    """Trains for a stage, telling each update (`LAG` updates late) and each validated epoch as they come.

    Args:
      model: the segmenter, its batch norm averaging over `AXIS`.
      tx: the stage's optimizer.
      state: the state to start from; its buffers are donated.
      stage: the stage.
      key: the run's; see `train_step`.
      train_batches: host batches, those of the updates that are still to be made.
      steps_per_epoch: updates in an epoch.
      evaluate: {'params', 'batch_stats'} -> (C, C) int64 confusion matrix of the validation split, or None if it broke
        off.
      devices: the devices of all processes.
      start: the epoch, from 1, and the number of its updates that are made already.
      wants_state: asked before each update but an epoch's first; where it says True, `Halfway` is told.

    Yields:
      `StepDone` for each update, `EpochDone` after each epoch and `Halfway` when it was asked for. After a validation
      that broke off comes `Halfway`, and nothing more.

    Raises:
      NonFiniteLossError: the loss is not finite.
    """
    update_step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        freeze_encoder=stage.freeze_encoder,
        max_degrees=stage.max_degrees,
        flip=stage.flip,
        jitter=stage.jitter,
        class_weights=stage.class_weights,
        axis_name=AXIS,
    )
    step_fn = pmap_step(update_step, devices, donate=True, compact=not stage.freeze_encoder, keyed=True)
    key = replicate(key, devices)
    # Where the images of the batches under way come from: a loss is known only later.
    under_way: collections.deque = collections.deque()
    batches = batches_on_devices(_keep_index(train_batches, under_way), devices)
    step = int(state.step)
    first_epoch, first_update = start
    for epoch in range(first_epoch, stage.epochs + 1):
        pending: collections.deque = collections.deque()
        for update in range(first_update, steps_per_epoch):
            if update and wants_state():
                yield from _late(epoch, pending)
                yield Halfway(epoch, update, state)
            state, metrics = step_fn(state, next(batches), key)
            step += 1
            pending.append((step, metrics, under_way.popleft()))
            if len(pending) > LAG:
                yield _step_done(epoch, *pending.popleft())
        first_update = 0
        # The evaluation is queued behind the last updates before their losses are waited for.
        confusion = evaluate({"params": state.params, "batch_stats": state.batch_stats})
        yield from _late(epoch, pending)
        if confusion is None:
            yield Halfway(epoch, steps_per_epoch, state)
            return
        yield EpochDone(epoch, step, confusion, mean_iou(confusion), state)


def _keep_index(batches: Iterable[Batch], under_way: collections.deque) -> Iterator[Batch]:
    """Passes on what the step needs; the index stays on the host."""
    for batch in batches:
        under_way.append(batch.get("index"))
        yield {name: x for name, x in batch.items() if name != "index"}


def _late(epoch: int, pending: collections.deque) -> Iterator[StepDone]:
    while pending:
        yield _step_done(epoch, *pending.popleft())


def _step_done(epoch: int, step: int, metrics: dict[str, jax.Array], index: np.ndarray | None) -> StepDone:
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
        raise NonFiniteLossError(loss, step, index)
    return StepDone(epoch, step, loss, index)


def make_evaluate(
    model: nn.Module,
    num_classes: int,
    devices: Sequence[jax.Device],
    *,
    native: bool = False,
    boundary: bool = False,
) -> Callable[[Any, Iterable[Batch]], np.ndarray]:
    """Builds the evaluation of a model over a split.

    Args:
      model: the segmenter.
      num_classes: C.
      devices: the devices of all processes.
      native: see `predict_step`.
      boundary: count what boundary IoU needs as well; see `jaxseg.boundary`.

    Returns:
      evaluate(variables, batches) -> (C, C) int64 confusion matrix, or with `boundary` the (2C, 2C) one of
      `boundary_confusion`; with variables {'params', 'batch_stats'} on the devices and host batches as `predict_step`
      takes them; it compiles once for each shape of batch.
    """
    step = functools.partial(eval_step, model=model, num_classes=num_classes, axis_name=AXIS)
    step_fn = pmap_step(functools.partial(step, native=native, boundary=boundary), devices)

    def evaluate(variables: Any, batches: Iterable[Batch]) -> np.ndarray:
        rows = 2 * num_classes if boundary else num_classes
        total = np.zeros((rows, rows), np.int64)
        if boundary:
            batches = ({**batch, "boundary_width": boundary_width(batch["label_size"])} for batch in batches)
        pending: collections.deque = collections.deque()
        for batch in batches_on_devices(batches, devices):
            pending.append(step_fn(variables, batch))
            if len(pending) > LAG:
                total += np.asarray(pending.popleft())
        return total + sum(np.asarray(confusion, np.int64) for confusion in pending)

    return evaluate


def make_encode(
    model: nn.Module, devices: Sequence[jax.Device]
) -> Callable[[Any, Iterable[Batch]], Iterator[np.ndarray]]:
    """Builds the encoding of many images by a frozen encoder.

    Args:
      model: the segmenter.
      devices: those of this process.

    Returns:
      encode(variables, batches) -> for each batch, in order, what `encode_step` gives; with variables on the devices
      and host batches that hold 'image'.
    """
    step_fn = pmap_step(functools.partial(encode_step, model=model), devices, per_image=True)

    def encode(variables: Any, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        pending: collections.deque = collections.deque()
        for batch in batches_on_devices(({"image": batch["image"]} for batch in batches), devices):
            pending.append(step_fn(variables, batch))
            if len(pending) > LAG:
                yield _together(pending.popleft())
        yield from map(_together, pending)

    return encode


def _together(x: jax.Array) -> np.ndarray:
    """(devices, images per device, ...) -> (images, ...), on the host."""
    return np.asarray(x).reshape(-1, *x.shape[2:])
