"""A plain PyTorch loop of knowledge distillation, as a competent engineer writes it: what this project has to beat.

The CIFAR ResNet-56 of the ONNX file teaches a ResNet of depth 6n + 2. Each batch is flipped and cropped at random, and the
teacher runs on the very pixels that the student sees. All is float32, eager, channels_last, in the threads that the process
has given to PyTorch. Images are uint8 [N, H, W, C], labels [N], seconds those of training alone, speeds per second.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; arXiv:1512.03385.
  Hinton et al., Distilling the Knowledge in a Neural Network, 2015; arXiv:1503.02531.
  Smith and Topin, Super-Convergence, 2018; arXiv:1708.07120.
"""

import functools
import itertools
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ev3_distill.runtime.files import atomic_write

if TYPE_CHECKING:
    import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per RGB channel of pixels / 255, as the teacher was trained
PADDING = 4  # black pixels on each side before a crop to the old size
PEAK_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4  # of SGD with Nesterov momentum; decay on every parameter
TEMPERATURE, ALPHA = 4.0, 0.9  # T; the weight of the teacher's share

Tell = Callable[[int, "torch.nn.Module", float], None]  # (epochs done, the model, seconds of training so far)
Batches = Iterator[tuple["torch.Tensor", "torch.Tensor"]]  # inputs [B, C, H, W] and labels [B]


class Training(NamedTuple):
    """A model and what trains it; all three change in place."""

    model: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    schedule: "torch.optim.lr_scheduler.LRScheduler"


def resnet(depth: int, width: int, num_classes: int, *, folded: bool = False) -> "torch.nn.Module":
    """A CIFAR ResNet, channels_last, with parameter-free shortcuts ("option A"): inputs [B, 3, H, W] to logits [B, K].

    Args:
      depth: 6n + 2 layers.
      width: filters of the first stage; the second has twice, the third four times as many.
      num_classes: K.
      folded: BatchNorm is part of the convolutions, which have a bias instead.
    """
    import torch
    from torch import nn

    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a resnet's depth is 6n + 2, at least 8; got {depth}: try 8")
    layers = dict(zip(("conv1", "bn1", "relu"), [*_conv(3, width, 1, folded), nn.ReLU(inplace=True)], strict=True))
    for i, c_out in enumerate((width, 2 * width, 4 * width), 1):
        blocks = [_block()(c_out if i == 1 else c_out // 2, c_out, 1 if i == 1 else 2, folded)]
        blocks += [_block()(c_out, c_out, 1, folded) for _ in range((depth - 2) // 6 - 1)]
        layers[f"layer{i}"] = nn.Sequential(*blocks)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(4 * width, num_classes)}
    model: Any = nn.Sequential(OrderedDict(layers))  # Any: PyTorch's types leave out memory_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model.to(memory_format=torch.channels_last)


@functools.cache
def _block() -> Any:
    """The class of a residual block; made at the first use, since its base is PyTorch's."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """relu(x' + BN(conv(relu(BN(conv(x)))))) with x' = x, subsampled and zero-padded where shapes differ."""

        def __init__(self, c_in: int, c_out: int, stride: int, folded: bool):
            super().__init__()
            self.conv1, self.bn1 = _conv(c_in, c_out, stride, folded)
            self.conv2, self.bn2 = _conv(c_out, c_out, 1, folded)
            self.stride, self.more = stride, (c_out - c_in) // 2

        def forward(self, x: "torch.Tensor") -> "torch.Tensor":
            y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
            y = self.bn2(self.conv2(y))
            if self.more:
                x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
            return functional.relu(y + x, inplace=True)

    return Block


def _conv(c_in: int, c_out: int, stride: int, folded: bool) -> "list[torch.nn.Module]":
    """A convolution and its BatchNorm."""
    from torch import nn

    norm = nn.Identity() if folded else nn.BatchNorm2d(c_out)
    return [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=folded), norm]


def teacher(path: Path | str) -> "torch.nn.Module":
    """The network of an ONNX file, in eval mode: normalised inputs [B, 3, H, W] to logits [B, K].

    The file's initializers must be those of a CIFAR ResNet exported with BatchNorm folded into the convolutions; depth,
    width and K are read off their shapes.
    """
    import onnx
    import torch

    initializers = {item.name: item for item in onnx.load(path).graph.initializer}
    state = {
        name.replace("weight_bias", "bias"): torch.tensor(onnx.numpy_helper.to_array(item))
        for name, item in initializers.items()
        if name.endswith((".weight", "bias"))
    }
    depth = sum(value.ndim == 4 for value in state.values()) + 1  # convolutions, and the linear layer
    model = resnet(depth, len(state["conv1.weight"]), len(state["linear.weight"]), folded=True)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def images_of(archive: Path | str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one part of a zipped image folder, PART/CLASS/NAME.

    Args:
      archive: the zip.
      part: train or test.

    Returns:
      images: [N, H, W, C] uint8, class by class in alphabetical order, by name within a class.
      labels: [N] int64.
    """
    from PIL import Image

    with zipfile.ZipFile(archive) as file:
        names = sorted(name.split("/") for name in file.namelist() if name.startswith(f"{part}/") and name[-1] != "/")
        images = [np.asarray(Image.open(file.open("/".join(name))).convert("RGB")) for name in names]
    return np.stack(images), np.unique([name[1] for name in names], return_inverse=True)[1]


def augmented(images: "torch.Tensor", corners: "torch.Tensor", flips: "torch.Tensor") -> "torch.Tensor":
    """Crops of the padded images, some flipped left to right.

    Args:
      images: [B, H, W, C].
      corners: [B, 2], upper and left edge of each crop within the padded image, from 0 to 2 * PADDING.
      flips: [B] bool.

    Returns:
      [B, H, W, C], in memory as in shape.
    """
    import torch
    from torch.nn import functional

    count, height, width = images.shape[:3]
    padded = functional.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    across = torch.arange(width, device=images.device)
    y = corners[:, :1] + torch.arange(height, device=images.device)
    x = corners[:, 1:] + torch.where(flips[:, None], across.flip(0), across)
    return padded[torch.arange(count, device=images.device)[:, None, None], y[:, :, None], x[:, None, :]]


def normalised(images: "torch.Tensor") -> "torch.Tensor":
    """uint8 [B, H, W, C] to what networks take: float32 [B, C, H, W], channels_last in memory."""
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
    depth: int,
    epochs: int,
    batch_size: int = 128,
    seed: int,
    kd: bool = True,
    tell: Tell | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> "torch.nn.Module":
    """Trains a student of the teacher's number of classes, 16 filters wide.

    Args:
      images: [N, H, W, 3] uint8, all of which each epoch visits once, the last batch of an epoch being what is left.
      labels: [N].
      teacher: as `teacher` returns it.
      depth: the student's, 6n + 2.
      epochs: over which the learning rate rises and falls once.
      batch_size: B.
      seed: of the initial parameters, the order and the augmentation.
      kd: whether to learn from the teacher too; else from labels alone.
      tell: called after each epoch.
      checkpoint: a file written after each epoch; where it exists, training goes on from there, bit by bit the same.
      device: cpu or cuda.
    """
    pixels, targets = _on(device, images), _on(device, labels.astype(np.int64))
    training = begin(depth, _classes(teacher), seed, steps=epochs * -(-len(labels) // batch_size), device=device)
    soft = teacher.to(device) if kd else None
    done, seconds = _restored(training, checkpoint)
    for epoch in range(done, epochs):
        began = time.perf_counter()
        _steps(training, soft, _batches(pixels, targets, batch_size, seed, epoch))
        _wait(device)
        seconds += time.perf_counter() - began
        if tell is not None:
            tell(epoch + 1, training.model, seconds)
        _save(training, checkpoint, epoch + 1, seconds)
    return training.model.eval()


def begin(depth: int, num_classes: int, seed: int, *, steps: int, device: str = "cpu") -> Training:
    """A fresh student of 16 filters, its optimizer, and the one-cycle schedule over so many steps."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet(depth, 16, num_classes).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=PEAK_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    one_cycle = torch.optim.lr_scheduler.OneCycleLR  # its default would cycle the momentum too
    return Training(model, optimizer, one_cycle(optimizer, PEAK_RATE, total_steps=steps, cycle_momentum=False))


def _steps(training: Training, soft: "torch.nn.Module | None", batches: Batches) -> None:
    """One step per batch, with a teacher or without."""
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
    """An epoch's batches: a permutation, each image cropped and flipped at random."""
    rng = np.random.default_rng([seed, epoch])
    count, device = len(labels), images.device
    order = _on(device, rng.permutation(count))
    corners = _on(device, rng.integers(0, 2 * PADDING + 1, (count, 2)))
    flips = _on(device, rng.random(count) < 0.5)
    for i in range(0, count, batch_size):
        rows, drawn = order[i : i + batch_size], slice(i, i + batch_size)
        yield normalised(augmented(images[rows], corners[drawn], flips[drawn])), labels[rows]


def predictions(model: "torch.nn.Module", images: np.ndarray, *, batch_size: int = 500) -> np.ndarray:
    """Classes [N] int32 that a model, set to eval mode for good, predicts of uint8 images [N, H, W, C]."""
    import torch

    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        found = [model(normalised(_on(device, batch))).argmax(1).cpu().numpy() for batch in batches]
    return np.concatenate(found).astype(np.int32)


def works(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    teacher: "torch.nn.Module",
    depth: int,
    batch_size: int = 128,
    steps: int,
    device: str = "cpu",
) -> dict[str, Callable[[], None]]:
    """What a speed suite times: each call does `steps` batches and waits for them; the first one also warms up.

    Returns:
      student: training steps of cross entropy, all on one batch at hand.
      ce: such steps on fresh batches, cropped and flipped: the loop without a teacher.
      kd: the loop with the teacher in it.
      teacher: forward passes of the teacher on one batch at hand.
    """
    import torch

    torch.backends.cudnn.benchmark = device != "cpu"
    pixels, targets, soft = _on(device, images), _on(device, labels.astype(np.int64)), teacher.to(device)
    fresh = _endless(pixels, targets, batch_size)
    batch = next(fresh)

    def stepper(soft: "torch.nn.Module | None", batches: Batches) -> Callable[[], None]:
        training = begin(depth, _classes(teacher), 0, steps=10**9, device=device)  # far from the schedule's end

        def work() -> None:
            _steps(training, soft, itertools.islice(batches, steps))
            _wait(device)

        return work

    def forward() -> None:
        with torch.no_grad():
            for _ in range(steps):
                soft(batch[0])
        _wait(device)

    same = itertools.repeat(batch)
    return {
        "student": stepper(None, same),
        "ce": stepper(None, fresh),
        "kd": stepper(soft, fresh),
        "teacher": forward,
    }


def speeds(works: dict[str, Callable[[], None]], *, steps: int, batch_size: int = 128) -> dict[str, float]:
    """How fast each of `works` runs, once warm: training steps per second, but images per second of `teacher`."""
    found = {}
    for name, work in works.items():
        work()
        began = time.perf_counter()
        work()
        found[name] = (batch_size if name == "teacher" else 1) * steps / (time.perf_counter() - began)
    return found


def _endless(images: "torch.Tensor", labels: "torch.Tensor", batch_size: int) -> Batches:
    """Full batches alone, epoch after epoch."""
    for epoch in itertools.count():
        yield from (batch for batch in _batches(images, labels, batch_size, 0, epoch) if len(batch[1]) == batch_size)


def _wait(device: str) -> None:
    """Until the device has done all that it was given."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def _on(device: "str | torch.device", array: np.ndarray) -> "torch.Tensor":
    """A copy on the device."""
    import torch

    return torch.tensor(array, device=device)


def _classes(model: "torch.nn.Module") -> int:
    """K of a network that `resnet` made."""
    head: Any = model.get_submodule("linear")
    return head.out_features


def _save(training: Training, path: Path | None, epochs: int, seconds: float) -> None:
    import torch

    if path is not None:
        state = {name: part.state_dict() for name, part in training._asdict().items()}
        with atomic_write(path) as file:
            torch.save({"epochs": epochs, "seconds": seconds, **state}, file)


def _restored(training: Training, path: Path | None) -> tuple[int, float]:
    """Epochs done and their seconds, after `training` was set to the file's state; nothing where there is no file."""
    import torch

    if path is None or not path.exists():
        return 0, 0.0
    found = torch.load(path, weights_only=True)  # never unpickles more than tensors and plain values
    for name, part in training._asdict().items():
        part.load_state_dict(found[name])
    return found["epochs"], found["seconds"]
