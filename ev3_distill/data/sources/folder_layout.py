"""Layout of an image folder: which images are train and which are test, and their classes."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from ev3_distill.data.class_names import nfc
from ev3_distill.data.sources.folder_entries import unread_images
from ev3_distill.data.sources.image_archive import Container
from ev3_distill.data.sources.image_decode import SUFFIXES
from ev3_distill.data.sources.parallel_decode import printable
from ev3_distill.errors import InputError

_TRAIN, _TEST, _VALIDATION = "train", "test", "val"
_SPLITS = {
    **dict.fromkeys(("train", "training"), _TRAIN),
    **dict.fromkeys(("test", "testing"), _TEST),
    **dict.fromkeys(("val", "valid", "validation"), _VALIDATION),
}
_LAYOUTS = "train/CLASS/ and test/CLASS/, CLASS/, or images without classes"
Path = tuple[str, ...]  # names from the root, or from a split, down to an image or folder
Group = dict[str, Path]  # images by full name
_LIKELY_UNLABELED = ("unlabeled", "unlabelled")


@dataclasses.dataclass(frozen=True)
class ImageListing:
    """The images of a folder: train before test, then by class, then by name."""

    names: list[str]
    labels: list[int]  # of each image; -1 if it has none
    is_test: list[bool]  # of each image
    class_names: tuple[str, ...]  # in alphabetical order, in normal form
    has_test: bool
    renamed: bool  # whether a folder's own name was not in normal form


def list_images(container: Container, place: str, warn: Callable[[str], None], *, unlabeled: str = "") -> ImageListing:
    """Recognizes the layout of an image folder.

    Args:
      container: its files and folders, including empty ones.
      place: of the folder, for messages.
      warn: called with what is left out.
      unlabeled: folder of training images without labels, at the top or within train; empty: none.

    Raises:
      InputError: there are no images, or no such folder, or their layout is not one of those known.
    """
    images = [name for name in container.files if name.lower().endswith(SUFFIXES)]
    others = sorted(set(container.files) - set(images))
    unread = unread_images(others, container.head)
    if not images:
        got = f"{len(others)} other files" + (f", such as the image {printable(unread[0])}" if unread else "")
        way_out = "convert them to PNG, or give them the suffix of their format" if unread else "check the path"
        raise InputError(f"{place} must hold images ({' '.join(SUFFIXES)}); got {got}: {way_out}")
    if unread:
        warn(
            f"{place}: ignored {len(unread)} images whose suffix is not one of {' '.join(SUFFIXES)}, such as "
            f"{printable(unread[0])}: convert them to PNG, or give them the suffix of their format"
        )
    if len(others) > len(unread):
        first = next(name for name in others if name not in unread)
        warn(f"{place}: ignored {len(others) - len(unread)} files that are not images, such as {printable(first)}")
    depth = _depth_of_root(images)
    if depth and all(name.count("/") == depth for name in images):
        warn(f"{place}: all images are in one folder, so they are used without labels")
    paths = {name: tuple(name.split("/"))[depth:] for name in images}
    below = [path for name in container.folders if (path := tuple(name.split("/"))[depth:])]
    without = _without_labels(paths, unlabeled, place) if unlabeled else []
    labeled = {name: path for name, path in paths.items() if name not in set(without)}
    groups = _groups(labeled, [path for path in below if not _is_within(path, unlabeled)], place, warn)
    return _combine(groups, place, without, warn)


def _without_labels(images: Group, unlabeled: str, place: str) -> list[str]:
    """The images in the folder `unlabeled`, in it or below, beside others.

    Raises:
      InputError: there are none, or no others, or some are in the test split.
    """
    without = {name: path for name, path in images.items() if _is_within(path, unlabeled)}
    if not without or len(without) == len(images):
        got = f"no image in a folder {printable(unlabeled)}" if not without else "no others beside them"
        raise InputError(
            f"{place}: unlabeled={unlabeled} needs a folder of images beside the folders of classes; got {got}: name "
            "that folder, or omit unlabeled"
        )
    for name, path in without.items():
        if nfc(path[0]) != unlabeled and _SPLITS[path[0].lower()] != _TRAIN:
            raise InputError(
                f"{place}: images without labels are for training; got {printable(name)}: move it to {unlabeled}/ at the top"
            )
    return sorted(without)


def _is_within(path: Path, unlabeled: str) -> bool:
    """Whether a path leads to or into the folder of images without labels, at the top or in a split."""
    top, *rest = map(nfc, path)
    return bool(unlabeled) and (top == unlabeled or (top.lower() in _SPLITS and rest[:1] == [unlabeled]))


def _depth_of_root(images: Sequence[str]) -> int:
    """Number of enclosing folders around all images that are not a split; an archive often has one."""
    parts = [name.split("/") for name in images]
    depth = 0
    while (
        all(len(path) > depth + 1 for path in parts)
        and len({path[depth] for path in parts}) == 1
        and parts[0][depth].lower() not in _SPLITS
    ):
        depth += 1
    return depth


def _groups(images: Group, folders: list[Path], place: str, warn: Callable[[str], None]) -> dict[str, Group]:
    """The images of train, and of test if there is one, each checked separately."""
    split_of = {path[0]: _SPLITS.get(path[0].lower()) for path in images.values()}
    if None in split_of.values():  # no splits; a class may have the name of a split
        other = min(top for top, split in split_of.items() if split is None)
        if len(set(split_of.values())) > 1 and max(map(len, images.values())) > 2:
            raise InputError(
                f"{place} must hold only train/ and test/; got {printable(other)} beside them: move it away, or give "
                f"unlabeled={printable(other)} if its images have no labels"
            )
        return {_TRAIN: _checked_group("", images, folders, place)}
    if len(set(split_of.values())) < len(split_of):
        raise InputError(f"{place} must hold each split once; got {', '.join(sorted(split_of))}: merge them")
    groups = {str(split): _below(top, images, folders, place) for top, split in split_of.items()}
    empty = [
        path[0] for path in folders if len(path) == 1 and _SPLITS.get(path[0].lower()) in {_TRAIN, _TEST} - {*groups}
    ]
    if _TRAIN not in groups or empty:
        got = f"{empty[0]}/ without one" if empty else f"{' and '.join(sorted(split_of))} alone"
        raise InputError(f"{place} must have images in train/ and test/; got {got}: add them, or rename the folder")
    if _VALIDATION in groups and _TEST in groups:
        warn(f"{place}: left out {len(groups[_VALIDATION])} images for validation, because there are some for test")
    test = groups.get(_TEST, groups.get(_VALIDATION))
    return {_TRAIN: groups[_TRAIN]} | ({_TEST: test} if test else {})


def _below(top: str, images: Group, folders: list[Path], place: str) -> Group:
    """The images of the split that is the folder `top`."""
    inside = {name: path[1:] for name, path in images.items() if path[0] == top}
    return _checked_group(f"{top}/", inside, [path[1:] for path in folders if path[0] == top and path[1:]], place)


def _checked_group(top: str, images: Group, folders: list[Path], place: str) -> Group:
    """Checks that all images are in class folders or none is, and that no class folder is empty."""
    of_depth = {len(path): name for name, path in images.items()}
    if set(of_depth) not in ({1}, {2}):
        got = " and ".join(printable(of_depth[depth]) for depth in sorted(of_depth)[-2:])
        raise InputError(
            f"{place} must be laid out as {_LAYOUTS}; got {got}: move images, or name the folder above CLASS/"
        )
    empty = {path[0] for path in folders} - {path[0] for path in images.values()}
    if set(of_depth) == {2} and empty:
        raise InputError(
            f"{place}: every class needs images; got {top}{printable(min(empty))}/ without one: add some or remove it"
        )
    return images


def _combine(groups: dict[str, Group], place: str, without: Sequence[str], warn: Callable[[str], None]) -> ImageListing:
    """Combines the splits, which must have the same classes, and the images without labels."""
    folders = {split: {path[0] for path in group.values() if len(path) == 2} for split, group in groups.items()}
    for split, present in folders.items():
        if repeated := [name for name, count in Counter(map(nfc, present)).items() if count > 1]:
            raise InputError(
                f"{place}: each class has one folder; got {printable(repeated[0])} twice in {split}, spelled differently in "
                "Unicode: merge them"
            )
    classes = {split: {_class_of(path) for path in group.values()} for split, group in groups.items()}
    known = set.union(*classes.values())
    for split, present in classes.items():
        if missing := sorted(known - present):
            what = f"class {printable(missing[0])}" if missing[0] else "images beside the class folders"
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise InputError(
                f"{place}: train and test must have the same classes; got none of {what}{more} in {split}: add or remove it"
            )
    names = sorted(known - {""})
    if len(names) == 1:
        raise InputError(
            f"{place}: at least 2 classes must occur; got {printable(names[0])} alone: add images of another class"
        )
    if without and not names:
        raise InputError(
            f"{place}: images without labels need images with labels beside them; got no folder of a class: omit unlabeled"
        )
    if likely := [name for name in names if name.lower() in _LIKELY_UNLABELED]:
        warn(f"{place}: {likely[0]} counts as a class; if its images have no labels, give unlabeled={likely[0]}")
    number = {"": -1} | {name: i for i, name in enumerate(names)}
    rows = [(split == _TEST, _class_of(path), name) for split, group in groups.items() for name, path in group.items()]
    rows = sorted([*rows, *((False, "", name) for name in without)])
    return ImageListing(
        names=[name for _, _, name in rows],
        labels=[number[label] for _, label, _ in rows],
        is_test=[is_test for is_test, _, _ in rows],
        class_names=tuple(names),
        has_test=_TEST in groups,
        renamed=any(nfc(name) != name for present in folders.values() for name in present),
    )


def _class_of(path: Path) -> str:
    """The class of an image in normal form: its folder; empty without one."""
    return nfc(path[0]) if len(path) == 2 else ""
