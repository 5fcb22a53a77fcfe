"""Data sets and pretrained files that the suites use, in the folder that EV3_DISTILL_DATA names.

mnist.npz, cifar10_jpeg.zip, omniglot_images_{background,evaluation}.zip
../teachers/cifar10_resnet56.onnx, the pretrained teacher
"""

import os
from pathlib import Path

from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError

NORMALIZED = Preprocessing(
    layout="NCHW", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)  # of the pretrained one


def data_folder() -> Path:
    """The folder that EV3_DISTILL_DATA names; by default `shared/data` beside the checkout."""
    return Path(os.environ.get("EV3_DISTILL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def source_of(name: str) -> str | None:
    """The `--data` source for digits or mnist; None if the MNIST file is missing."""
    if name == "digits":
        return "digits"
    path = data_folder() / "mnist.npz"
    return f"npz:{path}" if path.exists() else None


def required_source(name: str) -> str:
    """The `--data` source for digits or mnist.

    Raises:
      InputError: the MNIST file is missing.
    """
    source = source_of(name)
    if source is None:
        raise InputError(
            f"this benchmark needs {name}.npz; it is not in {data_folder()}: set EV3_DISTILL_DATA to its folder"
        )
    return source


def teacher_file() -> Path | None:
    """The pretrained ResNet-56 for CIFAR-10, in the folder `teachers` beside the data folder; None if it is missing."""
    path = data_folder().parent / "teachers" / "cifar10_resnet56.onnx"
    return path if path.exists() else None


def cifar10_files() -> tuple[Path, Path]:
    """The CIFAR-10 image archive and the pretrained teacher.

    Raises:
      InputError: one of them is missing.
    """
    archive, onnx = data_folder() / "cifar10_jpeg.zip", teacher_file()
    if onnx is None or not archive.exists():
        raise InputError(
            f"CIFAR-10 needs {archive} and ../teachers/cifar10_resnet56.onnx beside that folder; one is missing: set "
            "EV3_DISTILL_DATA to the folder"
        )
    return archive, onnx
