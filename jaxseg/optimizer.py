"""Which parameters train, and how."""

from typing import Any

import jax
import optax


def parameter_labels(params: Any, freeze_encoder: bool, own_rate: bool = False) -> Any:
    """Names each parameter's fate: 'train'; below the top-level key 'encoder' 'frozen' or, with `own_rate`, 'encoder'.

    Args:
      params: the segmenter's parameters, {'encoder': ..., 'decoder': ...}.
      freeze_encoder: whether the encoder's parameters stay as they are.
      own_rate: whether the encoder's, unless they are frozen, have a learning rate of their own.

    Returns:
      A tree of the same structure with a str for each leaf: every parameter has exactly one label.
    """
    encoder = "frozen" if freeze_encoder else "encoder" if own_rate else "train"
    return {
        part: jax.tree.map(lambda _, fate=encoder if part == "encoder" else "train": fate, tree)
        for part, tree in params.items()
    }


def make_schedule(name: str, learning_rate: float, steps: int) -> optax.Schedule:
    """The learning rate as a function of the stage's step.

    Args:
      name: 'constant', or 'cosine': up linearly in the stage's first twentieth, then along a cosine down to 0.
      learning_rate: the highest.
      steps: the updates of the whole stage.

    Raises:
      ValueError: the name is neither.
    """
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    if name == "cosine":
        # Adam's first steps are as long as its later ones, but their directions are noise.
        warmup = max(1, steps // 20)
        return optax.warmup_cosine_decay_schedule(learning_rate / warmup, learning_rate, warmup, max(steps, warmup + 1))
    raise ValueError(f"unknown schedule {name!r}: use constant or cosine")


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule, freeze_encoder: bool, b2: float = 0.999, encoder_rate: float = 1.0
) -> optax.GradientTransformation:
    """Adam on what trains; an update of exactly zero, and no optimizer memory, for what is frozen.

    Args:
      learning_rate: Adam's step size, or a schedule of the stage's step.
      freeze_encoder: whether the encoder's parameters stay as they are.
      b2: the decay of Adam's mean of squared gradients, in [0, 1).
      encoder_rate: the encoder's learning rate, while it trains, as a share of `learning_rate`.

    Returns:
      The transformation; its state's structure depends on `freeze_encoder`, so each stage needs its own `init`, and on
      whether a training encoder has the same rate.
    """
    own_rate = encoder_rate != 1 and not freeze_encoder
    transforms = {"train": optax.adam(learning_rate, b2=b2), "frozen": optax.set_to_zero()}
    if own_rate:
        transforms["encoder"] = optax.chain(optax.adam(learning_rate, b2=b2), optax.scale(encoder_rate))
    return optax.multi_transform(transforms, lambda params: parameter_labels(params, freeze_encoder, own_rate))
