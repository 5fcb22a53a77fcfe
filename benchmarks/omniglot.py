"""Omniglot for few-shot learning: 28x28, bright ink, four rotations of a character as four classes, the split of Vinyals et
al.

The split follows the list that torchmeta and the ProtoNet reference ship. All 1,623 characters are ordered by folder,
background before evaluation. The first 1,200 are for training: the 964 of the background, those of the alphabets Angelic to
Glagolitic, and 41 of Gurmukhi's 45. Five alphabets of these, 172 characters, are for validation. The other 423 are for test.

Drawings are reduced from 105x105 by averaging (bilinear, antialiased).

References:
  Lake, Salakhutdinov and Tenenbaum: Human-level concept learning through probabilistic program induction. Science 350, 2015.
  Vinyals et al.: Matching networks for one shot learning. 2016.
"""

import io
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.errors import InputError
from ev3_distill.runtime.files import atomic_write, cache_root

ARCHIVES = ("omniglot_images_background.zip", "omniglot_images_evaluation.zip")
SIDE, DRAWINGS = 28, 20
TRAINING = 1200  # characters, the first in order
VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")


class Characters(NamedTuple):
    """Drawings [C, 20, 28, 28] uint8 of three sets of characters; ink is 255."""

    train: np.ndarray  # C = 1,028
    validation: np.ndarray  # 172
    test: np.ndarray  # 423


def load() -> Characters:
    """Loads the three sets, which are decoded once and then cached.

    Raises:
      InputError: the archives are not in the folder that the environment variable EV3_DISTILL_DATA names.
    """
    cached = cache_root() / f"omniglot-{SIDE}.npz"
    if not cached.exists():
        drawings, alphabets = _decoded(Path(os.environ.get("EV3_DISTILL_DATA", ".")))
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cached) as file:
            np.savez_compressed(file, drawings=drawings, alphabets=alphabets)
    with np.load(cached) as saved:
        return split_characters(saved["drawings"], saved["alphabets"])


def split_characters(drawings: np.ndarray, alphabets: np.ndarray) -> Characters:
    """Splits drawings [1623, 20, 28, 28], in the order of their folders, by the names of their alphabets."""
    first = np.arange(len(drawings)) < TRAINING
    validation = first & np.isin(alphabets, VALIDATION)
    return Characters(drawings[first & ~validation], drawings[validation], drawings[~first])


def _decoded(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All drawings by character, and the alphabet of each character."""
    from PIL import Image

    drawings, alphabets = [], []
    for name in ARCHIVES:
        if not (folder / name).is_file():
            raise InputError(f"Omniglot is read from {name}; it is not in {folder}: set EV3_DISTILL_DATA to its folder")
        with zipfile.ZipFile(folder / name) as archive:
            for path in sorted(path for path in archive.namelist() if path.endswith(".png")):
                image = Image.open(io.BytesIO(archive.read(path))).convert("L")
                drawings.append(255 - np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
                alphabets.append(path.split("/")[-3])
    return np.stack(drawings).reshape(-1, DRAWINGS, SIDE, SIDE), np.array(alphabets[::DRAWINGS])


def episode(key: jax.Array, drawings: jax.Array, *, way: int, images: int) -> jax.Array:
    """Samples an episode without replacement, on the device: [way, images, 28, 28, 1] float32 in [0, 1].

    Args:
      key: of the episode.
      drawings: [C, 20, 28, 28] uint8; a class is a character in one of four rotations.
      way: number of classes.
      images: number of drawings per class, at most 20.
    """
    class_key, image_key = jax.random.split(key)
    classes = jax.random.choice(class_key, 4 * len(drawings), (way,), replace=False)
    order = jax.vmap(lambda k: jax.random.permutation(k, DRAWINGS)[:images])(jax.random.split(image_key, way))
    drawn = drawings[classes[:, None] // 4, order].astype(jnp.float32) / 255
    turned = jnp.stack([jnp.rot90(drawn, turns, axes=(2, 3)) for turns in range(4)])
    return turned[classes % 4, jnp.arange(way)][..., None]
