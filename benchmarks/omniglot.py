"""Omniglot as few-shot work takes it: 28x28, ink bright, four rotations of a character as four classes, the Vinyals split.

The split, by the list that torchmeta and the ProtoNet reference ship: of all 1,623 characters in the order of their folders,
background before evaluation, the first 1,200 are for training (these are the background's 964, the alphabets Angelic to
Glagolitic, and 41 of Gurmukhi's 45); of them five alphabets, 172 characters, are for validation. The other 423 are for test.

Drawings are shrunk from 105x105 by averaging (bilinear, antialiased).

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
    """Drawings [C, 20, 28, 28] uint8 of three sets of characters, ink 255."""

    train: np.ndarray  # C = 1,028
    validation: np.ndarray  # 172
    test: np.ndarray  # 423


def load() -> Characters:
    """The three sets, decoded once and kept in the cache.

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
        return parted(saved["drawings"], saved["alphabets"])


def parted(drawings: np.ndarray, alphabets: np.ndarray) -> Characters:
    """The split of drawings [1623, 20, 28, 28] in the order of their folders, with their alphabets' names."""
    first = np.arange(len(drawings)) < TRAINING
    validation = first & np.isin(alphabets, VALIDATION)
    return Characters(drawings[first & ~validation], drawings[validation], drawings[~first])


def _decoded(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All drawings by character, and each character's alphabet."""
    from PIL import Image

    drawings, alphabets = [], []
    for name in ARCHIVES:
        if not (folder / name).is_file():
            raise InputError(
                f"Omniglot is read from {name}; it is not in {folder}: name its folder by EV3_DISTILL_DATA"
            )
        with zipfile.ZipFile(folder / name) as archive:
            for path in sorted(path for path in archive.namelist() if path.endswith(".png")):
                image = Image.open(io.BytesIO(archive.read(path))).convert("L")
                drawings.append(255 - np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
                alphabets.append(path.split("/")[-3])
    return np.stack(drawings).reshape(-1, DRAWINGS, SIDE, SIDE), np.array(alphabets[::DRAWINGS])


def episode(key: jax.Array, drawings: jax.Array, *, way: int, images: int) -> jax.Array:
    """Classes and their drawings, drawn without replacement, on the device: [way, images, 28, 28, 1] float32 in [0, 1].

    Args:
      key: of the episode.
      drawings: [C, 20, 28, 28] uint8; a class is a character in one of four rotations.
      way: classes.
      images: of each, at most 20.
    """
    of_classes, of_images = jax.random.split(key)
    chosen = jax.random.choice(of_classes, 4 * len(drawings), (way,), replace=False)
    order = jax.vmap(lambda k: jax.random.permutation(k, DRAWINGS)[:images])(jax.random.split(of_images, way))
    drawn = drawings[chosen[:, None] // 4, order].astype(jnp.float32) / 255
    turned = jnp.stack([jnp.rot90(drawn, turns, axes=(2, 3)) for turns in range(4)])
    return turned[chosen % 4, jnp.arange(way)][..., None]
