"""What an image folder means: which images are train and which are test, and of what class."""

import dataclasses
from collections.abc import Callable, Sequence

from ev3_distill.data.sources.image_decode import SUFFIXES
from ev3_distill.data.sources.parallel_decode import shown
from ev3_distill.errors import InputError

_TRAIN, _TEST, _VALIDATION = "train", "test", "val"
_SPLITS = {
    **dict.fromkeys(("train", "training"), _TRAIN),
    **dict.fromkeys(("test", "testing"), _TEST),
    **dict.fromkeys(("val", "valid", "validation"), _VALIDATION),
}
_LAYOUTS = "train/CLASS/ and test/CLASS/, CLASS/, or images without classes"
Path = tuple[str, ...]  # of an image or a folder below the root or a split, part by part
Group = dict[str, Path]  # images by their full names


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a folder: train before test, then by class, then by name."""

    names: list[str]
    labels: list[int]  # of each image, -1 where there are no classes
    is_test: list[bool]  # of each image
    class_names: tuple[str, ...]  # in alphabetical order
    has_test: bool


def listed(files: Sequence[str], folders: Sequence[str], place: str, warn: Callable[[str], None]) -> Listing:
    """Recognises the layout of an image folder.

    Args:
      files: all names, with / between folders.
      folders: all folders' names, the empty ones' too.
      place: of the folder, for messages.
      warn: hears of what is left out.

    Raises:
      InputError: there are no images, or they are not laid out in one of the ways known.
    """
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        raise InputError(
            f"{place} must hold images ({' '.join(SUFFIXES)}); got {len(files)} other files: check the path"
        )
    if others := sorted(set(files) - set(images)):
        warn(f"{place}: ignored {len(others)} files that are no images, such as {shown(others[0])}")
    depth = _depth_of_root(images)
    if depth and all(name.count("/") == depth for name in images):
        warn(f"{place}: all images lie in one folder, so they are taken as images without classes")
    below = [tuple(name.split("/"))[depth:] for name in folders]
    groups = _groups(
        {name: tuple(name.split("/"))[depth:] for name in images}, [path for path in below if path], place, warn
    )
    return _ordered(groups, place)


def _depth_of_root(images: Sequence[str]) -> int:
    """How many folders hold all the images and are no split: an archive often has one around everything."""
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
    """The images of train, and of test where there is one, each checked by itself."""
    split_of = {path[0]: _SPLITS.get(path[0].lower()) for path in images.values()}
    if None in split_of.values():  # no splits: then a class may have the name of one
        strange = min(top for top, split in split_of.items() if split is None)
        if len(set(split_of.values())) > 1 and max(map(len, images.values())) > 2:
            raise InputError(
                f"{place} must hold train/ and test/ alone; got {shown(strange)} beside them: move it away"
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
    """All images lie in class folders, or none does; and no class folder is empty."""
    of_depth = {len(path): name for name, path in images.items()}
    if set(of_depth) not in ({1}, {2}):
        got = " and ".join(shown(of_depth[depth]) for depth in sorted(of_depth)[-2:])
        raise InputError(
            f"{place} must be laid out as {_LAYOUTS}; got {got}: move images, or name the folder above CLASS/"
        )
    empty = {path[0] for path in folders} - {path[0] for path in images.values()}
    if set(of_depth) == {2} and empty:
        raise InputError(
            f"{place}: every class needs images; got {top}{shown(min(empty))}/ without one: add some or remove it"
        )
    return images


def _ordered(groups: dict[str, Group], place: str) -> Listing:
    """Puts the splits together, which must have the same classes."""
    classes = {split: {_class_of(path) for path in group.values()} for split, group in groups.items()}
    known = set.union(*classes.values())
    for split, present in classes.items():
        if missing := sorted(known - present):
            what = f"class {shown(missing[0])}" if missing[0] else "images beside the class folders"
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise InputError(
                f"{place}: train and test must have the same classes; got none of {what}{more} in {split}: add or remove it"
            )
    names = sorted(known - {""})
    if len(names) == 1:
        raise InputError(
            f"{place}: at least 2 classes must occur; got {shown(names[0])} alone: add images of another class"
        )
    number = {"": -1} | {name: i for i, name in enumerate(names)}
    rows = [(split == _TEST, _class_of(path), name) for split, group in groups.items() for name, path in group.items()]
    rows.sort()
    return Listing(
        names=[name for _, _, name in rows],
        labels=[number[label] for _, label, _ in rows],
        is_test=[is_test for is_test, _, _ in rows],
        class_names=tuple(names),
        has_test=_TEST in groups,
    )


def _class_of(path: Path) -> str:
    """The folder that an image lies in, or nothing."""
    return path[0] if len(path) == 2 else ""
