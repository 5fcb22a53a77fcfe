"""A plain PyTorch loop of knowledge distillation, as an engineer would write it: the baseline of this project.

The pretrained ResNet-56 teaches a ResNet of depth 6n + 2 with 16 filters. Each batch is flipped and cropped at random, and the
teacher runs on the same pixels as the student. Everything is float32, eager and channels_last, on the threads that the process
gives to PyTorch. Images are uint8 [N, H, W, C], labels [N], times are seconds of training alone.

References:
  Hinton et al., Distilling the Knowledge in a Neural Network, 2015; arXiv:1503.02531.
  Smith and Topin, Super-Convergence, 2018; arXiv:1708.07120.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ev3_distill.benchmarks.torch_resnet import num_classes, resnet
from ev3_distill.runtime.files import atomic_write

if TYPE_CHECKING:
    import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per RGB channel of pixels / 255, as the teacher was trained
PADDING = 4  # black pixels on each side before a crop to the original size
PEAK_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4  # SGD with Nesterov momentum; decay on every parameter
TEMPERATURE, ALPHA = 4.0, 0.9  # T; the weight of the distillation loss
WIDTH = 16  # filters of the student's first stage

OnEpoch = Callable[[int, "torch.nn.Module", float], None]  # (epochs complete, the model, seconds of training so far)
Batches = Iterator[tuple["torch.Tensor", "torch.Tensor"]]  # inputs [B, C, H, W] and labels [B]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a student is trained."""

    depth: int  # of the student, 6n + 2
    epochs: int  # the learning rate rises and falls once over all of them
    seed: int  # of initial parameters, order and augmentation
    batch_size: int = 128
    kd: bool = True  # learn from teacher and labels; else from labels alone
    device: str = "cpu"  # or cuda


class Training(NamedTuple):
    """A model, its optimizer and its schedule; all three change in place."""

    model: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    schedule: "torch.optim.lr_scheduler.LRScheduler"


def augmented(images: "torch.Tensor", corners: "torch.Tensor", flips: "torch.Tensor") -> "torch.Tensor":
    """Crops of the padded images, some of them flipped left to right.

    Args:
      images: [B, H, W, C].
      corners: [B, 2], upper and left edge of each crop in the padded image, from 0 to 2 * PADDING.
      flips: [B] bool.

    Returns:
      [B, H, W, C], contiguous.
    """
    import torch
    from torch.nn import functional

    count, height, width = images.shape[:3]
    padded = functional.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    across = torch.arange(width, device=images.device)
    y = corners[:, :1] + torch.arange(height, device=images.device)
    x = corners[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    return padded[torch.arange(count, device=images.device)[:, None, None], y[:, :, None], x[:, None, :]]


def normalized(images: "torch.Tensor") -> "torch.Tensor":
    """Converts uint8 [B, H, W, C] to the networks' input: float32 [B, C, H, W], channels_last in memory."""
    import torch

    mean, deviation = (255 * torch.tensor(moment, device=images.device) for moment in (MEAN, STD))
    return images.float().sub_(mean).div_(deviation).permute(0, 3, 1, 2)


def kd_loss(logits: "torch.Tensor", soft: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """(1 - alpha) CE(labels, softmax(s)) + alpha T^2 KL(softmax(t / T) || softmax(s / T)), the mean over a batch.

    Args:
      logits: s [B, K], the student's.
      soft: t [B, K], the teacher's.
      labels: [B].
    """
    from torch.nn import functional

    ours = functional.log_softmax(logits / TEMPERATURE, dim=1)
    theirs = functional.log_softmax(soft / TEMPERATURE, dim=1)
    divergence = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return (1 - ALPHA) * functional.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * divergence


def train(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    teacher: "torch.nn.Module",
    options: Options,
    on_epoch: OnEpoch | None = None,
    checkpoint: Path | None = None,
) -> "torch.nn.Module":
    """Trains a student with as many classes as its teacher.

    Args:
      images: [N, H, W, 3] uint8. Each epoch visits all of them once; its last batch holds the remainder.
      labels: [N].
      teacher: as `load_teacher` returns it.
      options: depth, epochs, seed and so on.
      on_epoch: called after each epoch.
      checkpoint: a file that is written after each epoch. If it exists, training resumes from it, bit by bit the same.
    """
    device = options.device
    pixels, targets = _on(device, images), _on(device, labels.astype(np.int64))
    steps = options.epochs * -(-len(labels) // options.batch_size)
    training = start(options.depth, num_classes(teacher), options.seed, steps=steps, device=device)
    soft = teacher.to(device) if options.kd else None
    complete, seconds = _load(training, checkpoint)
    for epoch in range(complete, options.epochs):
        began = time.perf_counter()
        _steps(training, soft, _batches(pixels, targets, options.batch_size, options.seed, epoch))
        _wait(device)
        seconds += time.perf_counter() - began
        if on_epoch is not None:
            on_epoch(epoch + 1, training.model, seconds)
        _save(training, checkpoint, epoch + 1, seconds)
    return training.model.eval()


def start(depth: int, classes: int, seed: int, *, steps: int, device: str = "cpu") -> Training:
    """A fresh student, its optimizer, and a one-cycle schedule over all steps."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet(depth, WIDTH, classes).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=PEAK_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    one_cycle = torch.optim.lr_scheduler.OneCycleLR  # by default it would cycle the momentum too
    return Training(model, optimizer, one_cycle(optimizer, PEAK_RATE, total_steps=steps, cycle_momentum=False))


def _steps(training: Training, soft: "torch.nn.Module | None", batches: Batches) -> None:
    """One step per batch, with or without a teacher."""
    import torch
    from torch.nn import functional

    training.model.train()
    for inputs, labels in batches:
        logits = training.model(inputs)
        if soft is None:
            loss = functional.cross_entropy(logits, labels)
        else:
            with torch.no_grad():
                target = soft(inputs)
            loss = kd_loss(logits, target, labels)
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        training.optimizer.step()
        training.schedule.step()


def _batches(images: "torch.Tensor", labels: "torch.Tensor", batch_size: int, seed: int, epoch: int) -> Batches:
    """An epoch's batches: a permutation of the images, each cropped and flipped at random."""
    rng = np.random.default_rng([seed, epoch])
    count, device = len(labels), images.device
    order = _on(device, rng.permutation(count))
    corners = _on(device, rng.integers(0, 2 * PADDING + 1, (count, 2)))
    flips = _on(device, rng.random(count) < 0.5)
    for i in range(0, count, batch_size):
        rows, drawn = order[i : i + batch_size], slice(i, i + batch_size)
        yield normalized(augmented(images[rows], corners[drawn], flips[drawn])), labels[rows]


def predictions(model: "torch.nn.Module", images: np.ndarray, *, batch_size: int = 500) -> np.ndarray:
    """Predicted classes [N] int32 of uint8 images [N, H, W, C]; leaves the model in eval mode."""
    import torch

    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        classes = [model(normalized(_on(device, batch))).argmax(1).cpu().numpy() for batch in batches]
    return np.concatenate(classes).astype(np.int32)


def timed_loops(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    teacher: "torch.nn.Module",
    depth: int,
    batch_size: int = 128,
    steps: int,
    device: str = "cpu",
) -> dict[str, Callable[[], None]]:
    """Loops for timing. Each call takes `steps` batches and waits for the device; the first call also warms up.

    Returns:
      student: training steps of cross entropy, all on one batch.
      kd: training steps with the teacher on fresh batches, cropped and flipped.
    """
    import torch

    torch.backends.cudnn.benchmark = device != "cpu"
    pixels, targets, soft = _on(device, images), _on(device, labels.astype(np.int64)), teacher.to(device)
    fresh = _endless(pixels, targets, batch_size)
    batch = next(fresh)

    def loop(soft: "torch.nn.Module | None", batches: Batches) -> Callable[[], None]:
        training = start(depth, num_classes(teacher), 0, steps=10**9, device=device)  # far from the schedule's end

        def work() -> None:
            _steps(training, soft, itertools.islice(batches, steps))
            _wait(device)

        return work

    return {"student": loop(None, itertools.repeat(batch)), "kd": loop(soft, fresh)}


def _endless(images: "torch.Tensor", labels: "torch.Tensor", batch_size: int) -> Batches:
    """Full batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from (batch for batch in _batches(images, labels, batch_size, 0, epoch) if len(batch[1]) == batch_size)


def _wait(device: str) -> None:
    """Waits until the device has finished its work."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def _on(device: "str | torch.device", array: np.ndarray) -> "torch.Tensor":
    """A copy on the device."""
    import torch

    return torch.tensor(array, device=device)


def _save(training: Training, path: Path | None, epochs: int, seconds: float) -> None:
    import torch

    if path is not None:
        state = {name: part.state_dict() for name, part in training._asdict().items()}
        with atomic_write(path) as file:
            torch.save({"epochs": epochs, "seconds": seconds, **state}, file)


def _load(training: Training, path: Path | None) -> tuple[int, float]:
    """Restores `training` from a checkpoint; returns its epochs and their seconds, or zeros if there is no file."""
    import torch

    if path is None or not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)  # unpickles nothing but tensors and plain values
    for name, part in training._asdict().items():
        part.load_state_dict(state[name])
    return state["epochs"], state["seconds"]
