"""`folder:DIR` and `folder:FILE.zip`: images in folders that name their classes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ev3_distill.data.class_names import nfc
from ev3_distill.data.sources.dataset import Dataset, ReadOptions
from ev3_distill.data.sources.folder_entries import warn_of_entries
from ev3_distill.data.sources.folder_layout import ImageListing, list_images
from ev3_distill.data.sources.image_archive import open_container
from ev3_distill.data.sources.image_decode import decode_image
from ev3_distill.data.sources.image_options import parse_place
from ev3_distill.data.sources.image_traits import TraitsRecord, warn_of_traits
from ev3_distill.data.sources.parallel_decode import DecodedRows, Encoded, decode_all, printable
from ev3_distill.data.sources.place_options import split_options
from ev3_distill.errors import InputError

_FORMAT = 1  # version of the content that is hashed for the fingerprint


def load(place: str, options: ReadOptions) -> Dataset:
    """Loads the images of a folder or an archive; they are decoded once and then cached.

    Raises:
      InputError: the place is missing or not laid out as an image folder, or its images differ in size or cannot be read.
    """
    place_of_images, unlabeled = _unlabeled_folder(place)
    path, image_options = parse_place(place_of_images, _exists)
    if options.stored_pixels:
        image_options = image_options.as_stored()
    container = open_container(Path(path).expanduser())
    warn_of_entries(container.entries, path, options.warn)
    _warn_of_guesses(container.guessed, path, options)
    listing = list_images(container, path, options.warn, unlabeled=unlabeled)
    names = listing.names
    other_names = [listing.class_names] if listing.renamed or container.recoded else []  # than older versions read
    without = [{"unlabeled": unlabeled}] if unlabeled else []
    content = json.dumps([_FORMAT, container.fingerprint(names), image_options.form, *other_names, *without])
    record = TraitsRecord(len(names), image_options)
    images = Encoded(
        place=path,
        names=names,
        decode=lambda i: record.add(i, decode_image(container.read(names[i]), image_options)),
        size_hint=f"folder:{path},size=32 gives all that size",
        decoding=json.dumps(image_options),
        notes=record.notes,
    )
    decoded = decode_all(images, content, options)
    warn_of_traits(decoded.notes, names, path, image_options, options.warn)
    return _dataset(listing, decoded, f"folder:{place}")


def _exists(place: str) -> bool:
    return os.path.exists(os.path.expanduser(place))


def _unlabeled_folder(place: str) -> tuple[str, str]:
    """The place without the option `unlabeled`, and its value: the name of the folder of images without labels."""
    path, values = split_options(place, _exists)
    unlabeled = values.pop("unlabeled", "")
    return ",".join([path, *(f"{name}={value}" for name, value in values.items())]), nfc(unlabeled)


def _warn_of_guesses(names: Sequence[str], path: str, options: ReadOptions) -> None:
    """Warns of names in an archive that are not in UTF-8, because their encoding cannot be known."""
    if names:
        options.warn(
            f"{path}: the archive does not say how {len(names):,} names are encoded; they were read as code page 437, such as "
            f"{printable(names[0])}: if that is wrong, pack it again with names in UTF-8"
        )


def _dataset(listing: ImageListing, decoded: DecodedRows, source: str) -> Dataset:
    labels, is_test, valid = np.array(listing.labels, np.int32), np.array(listing.is_test), decoded.valid
    for part in np.unique(is_test):
        lost = {*labels[is_test == part].tolist()} - {*labels[valid & (is_test == part)].tolist()}
        if lost := lost - {-1} if listing.class_names else lost:
            what = f"images of class {listing.class_names[min(lost)]}" if listing.class_names else "images"
            raise InputError(
                f"{source}: {what} must be readable; got none in {'test' if part else 'train'}: repair some"
            )
    test_rows = np.flatnonzero(is_test[valid]) if listing.has_test else None
    names = listing.class_names
    files = tuple(name for name, is_valid in zip(listing.names, valid, strict=True) if is_valid)
    return Dataset(decoded.rows, labels[valid], len(names), names, test_rows, source, decoded.fingerprint, names=files)
