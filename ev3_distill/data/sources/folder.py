"""`folder:DIR` and `folder:FILE.zip`: images in folders that name their classes."""

import json
import os
from pathlib import Path

import numpy as np

from ev3_distill.data.sources.dataset import Dataset, Reading
from ev3_distill.data.sources.folder_layout import Listing, listed
from ev3_distill.data.sources.image_archive import opened
from ev3_distill.data.sources.image_decode import pixels
from ev3_distill.data.sources.image_options import parsed
from ev3_distill.data.sources.parallel_decode import Decoded, Gallery, decoded
from ev3_distill.errors import InputError

_FORMAT = 1  # of what a fingerprint is taken of


def load(place: str, reading: Reading) -> Dataset:
    """Images of a folder or an archive, decoded once and kept in the cache.

    Raises:
      InputError: the place is missing, not laid out as an image folder, or has images that differ in size or cannot be
        read.
    """
    where, form = parsed(place, lambda place: os.path.exists(os.path.expanduser(place)))
    container = opened(Path(where).expanduser())
    listing = listed(container.files, container.folders, where, reading.warn)
    names = listing.names
    content = json.dumps([_FORMAT, container.fingerprint(names), form])
    images = Gallery(
        place=where,
        names=names,
        row=lambda i: pixels(container.content(names[i]), form),
        one_size=f"folder:{where},size=32 gives all that size",
    )
    return _dataset(listing, decoded(images, content, reading), f"folder:{place}")


def _dataset(listing: Listing, made: Decoded, source: str) -> Dataset:
    labels, is_test, kept = np.array(listing.labels, np.int32), np.array(listing.is_test), made.kept
    for part in np.unique(is_test):
        if lost := {*labels[is_test == part].tolist()} - {*labels[kept & (is_test == part)].tolist()}:
            what = f"images of class {listing.class_names[min(lost)]}" if listing.class_names else "images"
            raise InputError(
                f"{source}: {what} must be readable; got none in {'test' if part else 'train'}: repair some"
            )
    test_rows = np.flatnonzero(is_test[kept]) if listing.has_test else None
    names = listing.class_names
    return Dataset(made.rows, labels[kept], len(names), names, test_rows, source, made.fingerprint)
