"""Candidate repairs: common silent errors in preprocessing, each as the change of options that undoes it."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ev3_distill.config import Preprocessing
from ev3_distill.teachers.preprocessing import AXES

Changes = dict[str, Any]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_MNIST = ((0.1307,), (0.3081,))
_CAFFE = (103.939, 116.779, 123.68)  # mean of BGR bytes


class Repair(NamedTuple):
    """A change of preprocessing that may repair a teacher.

    Attributes:
      name: describes the input after the change.
      changes: fields of its `Preprocessing`.
    """

    name: str
    changes: Changes


def repairs(now: Preprocessing, shape: Sequence[int], *, pixels: bool) -> list[list[Repair]]:
    """Lists single repairs, grouped by kind. Small changes come first, then the more common ones.

    Args:
      now: the preprocessing in force.
      shape: of one example of the data.
      pixels: whether the data are images or uint8, so that their range is known.
    """
    channels = now.channels or shape[-1]
    ranges = [*_scales(now), *_inverted(now), *_ranges(now, channels if len(shape) == 3 else 0)] if pixels else []
    return [_orders(now, channels, len(shape)), _layouts(now, len(shape)), ranges]


def pairs(groups: Sequence[Sequence[Repair]]) -> list[Repair]:
    """Combines two repairs of different groups."""
    return [
        Repair(f"{one.name} and {other.name}", one.changes | other.changes)
        for first, second in itertools.combinations(groups, 2)
        for one, other in itertools.product(first, second)
        if not set(one.changes) & set(other.changes)
    ]


def _scales(now: Preprocessing) -> list[Repair]:
    scale = now.scale or 1.0
    return [
        Repair("pixels times 255", {"scale": scale * 255}),
        Repair("pixels divided by 255", {"scale": scale / 255}),
    ]


def _ranges(now: Preprocessing, channels: int) -> list[Repair]:
    """Common settings of scale, mean and std."""
    settings: list[tuple[str, float, tuple[float, ...], tuple[float, ...]]] = [
        ("pixels in [0, 1] without mean and std", 1.0, (0.0,), (1.0,)),
        ("pixels as bytes without mean and std", 255.0, (0.0,), (1.0,)),
        ("pixels in [-1, 1]", 1.0, (0.5,), (0.5,)),
    ]
    if channels == 3:
        settings.insert(0, ("ImageNet's mean and std", 1.0, *_IMAGENET))
        settings.append(("CIFAR-10's mean and std", 1.0, *_CIFAR10))
    if channels == 1:
        settings.append(("MNIST's mean and std", 1.0, *_MNIST))
    present = (now.scale or 1.0, now.mean or (0.0,), now.std or (1.0,))
    ranges = [Repair(name, dict(zip(("scale", "mean", "std"), setting, strict=True))) for name, *setting in settings
             if tuple(setting) != present]  # fmt: skip
    if channels == 3:
        caffe = {"scale": 255.0, "mean": _CAFFE, "std": (1.0,), "order": "BGR"}
        ranges.append(Repair("BGR bytes minus ImageNet's mean, as in Caffe", caffe))
    return ranges


def _inverted(now: Preprocessing) -> list[Repair]:
    """1 - x instead of x: s (1 - x) - m = -s x - (m - s)."""
    scale, mean = now.scale or 1.0, now.mean or (0.0,)
    return [Repair("black and white swapped", {"scale": -scale, "mean": tuple(m - scale for m in mean)})]


def _orders(now: Preprocessing, channels: int, rank: int) -> list[Repair]:
    if rank != 3 or channels != 3:
        return []
    order = "RGB" if now.order == "BGR" else "BGR"
    return [Repair(f"channel order {order}", {"order": order})]


def _layouts(now: Preprocessing, rank: int) -> list[Repair]:
    if rank not in (2, 3):
        return []
    layouts = [layout for layout in AXES if rank == 3 or layout in ("NHWC", "NCHW")]
    return [Repair(f"layout {layout}", {"layout": layout}) for layout in layouts if layout != (now.layout or "NHWC")]
