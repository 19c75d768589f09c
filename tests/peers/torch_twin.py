"""The baseline in PyTorch: same initial values, same batches, same recipe, for comparing what is learnt.

    python -m tests.peers.torch_twin --dataset folder:DIR --weights PATH [options of experiments.baseline]

Takes the options of experiments.baseline, trains on the CPU in channels_last, prints the same tables and writes
results.json into a folder beside the baseline's --workdir, torch-<its name>. Needs torch.
"""

import functools
import itertools
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.prepare import prepare
from experiments.results import print_table, write_results
from experiments.settings import parse
from jaxseg import metrics, optimizer
from jaxseg.data import loader
from jaxseg.decoders import BaselineDecoder
from jaxseg.pretrained import to_torch
from jaxseg.segmenter import MEAN, STD, STRIDE
from tests.peers.torch_resnet import ResNet


class Decoder(nn.Module):
    """The report's decoders: the baseline, or with batch norm and dropout the improved one."""

    def __init__(self, channels: int, num_classes: int, improved: bool = False, dropout: float = 0.0):
        super().__init__()
        widths = (channels, 256, 128, 64, 32, 16)
        self.depth, self.dropout = len(widths) - 1, dropout
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            layer = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            self.add_module(f"conv_transpose{number}", layer)
            self.add_module(f"bn{number}", nn.BatchNorm2d(outputs) if improved else nn.Identity())
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, x):
        for number in range(1, 1 + self.depth):
            x = self.get_submodule(f"conv_transpose{number}")(x)
            x = functional.relu(self.get_submodule(f"bn{number}")(x), inplace=True)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        return self.head(x)


class Segmenter(nn.Module):
    """uint8 NHWC image -> float32 NCHW logits of the same height and width; the other arguments are `Decoder`'s."""

    def __init__(self, num_classes: int, variant: str = "resnet18", improved: bool = False, dropout: float = 0.0):
        super().__init__()
        self.encoder = ResNet(variant)
        self.decoder = Decoder(self.encoder.channels, num_classes, improved, dropout)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, image, freeze_encoder=False):
        x = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        height, width = x.shape[2:]
        x = functional.pad(x, (0, -width % STRIDE, 0, -height % STRIDE)).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder):
            features = self.encoder(x)[STRIDE]
        return self.decoder(features)[:, :, :height, :width]


def torch_state(variables) -> dict[str, torch.Tensor]:
    """Flax variables -> this module's state dict (without the batch norms' counters)."""
    return {name: torch.tensor(array) for name, array in to_torch(variables).items()}


def load(model: Segmenter, variables) -> Segmenter:
    """Loads Flax variables strictly: every tensor but the batch norms' counters."""
    missing, unexpected = model.load_state_dict(torch_state(variables), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"tensors that do not fit: missing {missing}, unexpected {unexpected}")
    return model.to(memory_format=torch.channels_last)


def train_epoch(model, adam, schedule, batches, steps: int, stage) -> float:
    """Trains for one epoch; returns the mean loss."""
    model.train()
    if stage.freeze_encoder:
        model.encoder.eval()
    losses = []
    for _ in range(steps):
        batch = next(batches)
        adam.zero_grad(set_to_none=True)
        logits = model(torch.from_numpy(batch["image"]), stage.freeze_encoder)
        label = torch.from_numpy(batch["label"]).long()
        loss = functional.cross_entropy(
            logits, label, stage.class_weights and torch.tensor(stage.class_weights), ignore_index=255
        )
        loss.backward()
        adam.step()
        schedule.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.inference_mode()
def evaluate(model, batches, num_classes: int) -> np.ndarray:
    """The (C, C) int64 confusion matrix, the logits enlarged to each label's own size."""
    model.eval()
    total = np.zeros((num_classes, num_classes), np.int64)
    for batch in batches:
        logits = model(torch.from_numpy(batch["image"]))
        for index, (height, width) in enumerate(batch["label_size"].tolist()):
            if not batch["valid"][index]:
                continue
            enlarged = functional.interpolate(logits[index : index + 1], (height, width), mode="bilinear")
            prediction = enlarged.argmax(1).numpy().ravel()
            label = batch["label"][index, :height, :width].astype(np.int64).ravel()
            cells = (label * num_classes + prediction)[label != 255]
            total += np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    return total


def main(argv: list[str] | None = None) -> int:
    """Trains the twin; returns the exit code."""
    settings = parse("baseline", __doc__, argv)
    if settings.boundary_iou:
        raise ValueError("--boundary-iou: the twin computes IoU only")
    prepared = prepare(settings, lambda num_classes, _: BaselineDecoder(num_classes))
    workdir = settings.workdir.with_name(f"torch-{settings.workdir.name}")
    workdir.mkdir(parents=True)
    num_classes, splits = prepared.labels.num_classes, prepared.splits
    model = load(Segmenter(num_classes, settings.encoder), prepared.variables)
    sizes = {"image_size": settings.image_size, "batch_size": settings.batch_size}
    eval_batches = {split: functools.partial(loader.eval_batches, splits[split], **sizes) for split in splits}
    steps = loader.steps_per_epoch(splits["train"], settings.batch_size)
    best, best_state = None, None
    for number, stage in prepared.stages.items():
        batches = iter(loader.train_batches(splits["train"], seed=2 * settings.seed + number, **sizes))
        # LambdaLR multiplies the optimizer's own rate, which is therefore 1.
        parameters = [{"params": model.decoder.parameters()}]
        if not stage.freeze_encoder:
            parameters.append({"params": model.encoder.parameters(), "lr": stage.encoder_rate})
        adam = torch.optim.Adam(parameters, 1.0, betas=(0.9, settings.adam_b2))
        rate = optimizer.make_schedule(stage.schedule, stage.learning_rate, stage.epochs * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step, rate=rate: float(rate(step)))
        for epoch in range(1, stage.epochs + 1):
            start = time.perf_counter()
            loss = train_epoch(model, adam, schedule, batches, steps, stage)
            trained = time.perf_counter() - start
            confusion = evaluate(model, eval_batches["val"](), num_classes)
            score = metrics.mean_iou(confusion)
            seconds = time.perf_counter() - start
            result = f"loss {loss:.4f}  val mean_iou {score:.4f}  {seconds:.1f} s, training {trained:.1f} s"
            print(f"epoch {epoch}/{stage.epochs}  {result}", flush=True)
            if best is None or score > metrics.mean_iou(best):
                best, best_epoch = confusion, {"stage": stage.name, "epoch": epoch}
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    results = {"val": best}
    if "test" in splits:
        results["test"] = evaluate(model, eval_batches["test"](), num_classes)
    for split, confusion in results.items():
        print(f"\n{split} split, best epoch:")
        print_table(confusion, prepared.labels)
    write_results(workdir, best_epoch, results, prepared.labels, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
