"""Builds folders and archives of small images, each determined by a seed."""

import io
import zipfile

import numpy as np
from PIL import Image

from ev3_distill.data.sources import load_data


def picture(seed, size=(4, 6), channels=3):
    """Pixels determined by the seed."""
    array = np.random.default_rng(seed).integers(0, 256, (*size, channels)).astype(np.uint8)
    return array[..., 0] if channels == 1 else array


def encoded(array, suffix="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, suffix, **options)
    return buffer.getvalue()


TRAIN = ["train/ant/b.png", "train/ant/a.png", "train/bee/1.PNG", "train/bee/2.png"]
TEST = ["test/bee/x.png", "test/ant/y.png"]


def contents(names, **options):
    """File contents by name: an image for each, whose seed is its position in the list."""
    return {name: encoded(picture(i, **options)) for i, name in enumerate(names)}


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content)
    return f"folder:{root}"


def archive(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return f"folder:{path}"


def both(tmp_path, files):
    """Yields the same files as a directory and as archives."""
    yield tree(tmp_path / "tree", files)
    yield archive(tmp_path / "set.zip", files)
    yield archive(tmp_path / "stored.ZIP", files, zipfile.ZIP_STORED)


def load(source, **options):
    """The data set, and the warnings."""
    warnings = []
    return load_data(source, warn=warnings.append, **options), warnings


def seeds_of(dataset, **options):
    """The seed of the image in each row."""
    known = {picture(seed, **options).tobytes(): seed for seed in range(20)}
    return [known[row.tobytes()] for row in dataset.inputs[:]]
