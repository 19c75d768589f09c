"""The benchmark's pieces of work in PyTorch, as a user would write them: channels_last, Adam, no needless copies."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from experiments.works import Load
from tests.peers import torch_twin


def rotate(image: torch.Tensor, label: torch.Tensor, max_degrees: float):
    """Rotates each image (N, H, W, 3) uint8 and label (N, H, W) by an angle of its own; corners: mean colour, 255."""
    number, height, width = label.shape
    angle = (torch.rand(number, device=image.device) * 2 - 1) * math.radians(max_degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = (torch.stack([cos, -sin * height / width, zero], 1), torch.stack([sin * width / height, cos, zero], 1))
    grid = functional.affine_grid(torch.stack(rows, 1), [number, 3, height, width], align_corners=False)
    mean = 255 * torch.tensor(torch_twin.MEAN, device=image.device).view(1, 3, 1, 1)
    x = functional.grid_sample(image.permute(0, 3, 1, 2).float() - mean, grid, align_corners=False) + mean
    y = functional.grid_sample(label[:, None].float() - 255, grid, "nearest", align_corners=False)[:, 0] + 255
    return x.round().byte().permute(0, 2, 3, 1), y.round().byte()


def prepare(work: str, load: Load, batches: Iterator, form: str) -> Callable[[int], None]:
    """As `experiments.works.prepare`; form is 'eager', 'compile', 'bf16' or 'compile-bf16'."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    freeze, improved = work == "stage1", load.model == "improved"
    dropout = load.dropout if improved and not freeze else 0.0
    model = torch_twin.Segmenter(load.num_classes, load.encoder, improved, dropout)
    model = model.to(device, memory_format=torch.channels_last)
    trained = model.decoder.parameters() if freeze else model.parameters()
    adam = torch.optim.Adam(trained, 1e-3, fused=True)
    model.train(work in ("stage1", "stage2"))
    if freeze:
        model.encoder.eval()
    call = torch.compile(model) if form.startswith("compile") else model

    def cast():
        return torch.autocast(device.type, torch.bfloat16) if form.endswith("bf16") else contextlib.nullcontext()

    def on_device(array):
        return torch.from_numpy(array).to(device, non_blocking=True)

    def train(batch) -> None:
        image, label = on_device(batch["image"]), on_device(batch["label"])
        if improved:
            image, label = rotate(image, label, load.max_degrees)
        adam.zero_grad(set_to_none=True)
        with cast():
            logits = call(image, freeze)
        functional.cross_entropy(logits.float(), label.long(), ignore_index=255).backward()
        adam.step()

    @torch.inference_mode()
    def infer(batch) -> torch.Tensor:
        with cast():
            return call(on_device(batch["image"]))

    @torch.inference_mode()
    def validate(batch) -> torch.Tensor:
        logits, label = infer(batch).float(), on_device(batch["label"])
        if logits.shape[2:] != label.shape[1:]:
            logits = functional.interpolate(logits, label.shape[1:], mode="bilinear")
        cells = label.long() * load.num_classes + logits.argmax(1)
        return torch.bincount(cells[label != 255], minlength=load.num_classes**2)

    do = {"validation": validate, "inference": lambda batch: infer(batch).argmax(1)}.get(work, train)

    def work_on(number: int) -> None:
        for _ in range(number):
            do(next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work_on
