"""Images of a folder: formats, pixel modes, sizes and options."""

import io
import re

import numpy as np
import pytest
from image_files import TEST, TRAIN, both, contents, encoded, load, picture, seeds_of, tree
from PIL import Image

from ev3_distill.data.sources import load_data, parallel_decode
from ev3_distill.data.sources.image_decode import decode_image
from ev3_distill.data.sources.image_options import ImageOptions, parse_place
from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


# Images of all sorts.


def test_all_image_formats_are_read(tmp_path):
    lossless = ["png", "bmp", "webp", "tiff", "ppm"]
    files = {f"{suffix}.{suffix}": encoded(picture(i), suffix, lossless=True) for i, suffix in enumerate(lossless)}
    dataset, _ = load(tree(tmp_path / "tree", files))
    assert dict(zip(sorted(files), seeds_of(dataset), strict=True)) == {f"{s}.{s}": i for i, s in enumerate(lossless)}
    smooth = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (1, 32, 3))
    dataset, _ = load(tree(tmp_path / "jpeg", {"1.jpg": encoded(smooth, "jpeg"), "2.JPEG": encoded(smooth, "jpeg")}))
    assert np.abs(dataset.inputs.astype(int) - smooth).max() < 8


def test_gray_images_become_rgb_beside_color(tmp_path):
    grey = contents(["ant/a.png", "bee/b.png"], channels=1)
    dataset, _ = load(tree(tmp_path / "grey", grey))
    assert dataset.inputs.shape == (2, 4, 6, 1)
    assert seeds_of(dataset, channels=1) == [0, 1]
    for name in ("bee/z.png", "ant/0.png"):  # after the grey ones, and before them
        dataset, _ = load(tree(tmp_path / name, grey | {name: encoded(picture(2))}))
        assert dataset.inputs.shape == (3, 4, 6, 3)
        expected = {0: picture(0, channels=1), 1: picture(1, channels=1)}
        expected = [np.repeat(array[..., None], 3, axis=-1) for array in expected.values()]
        expected.insert(2 if name > "bee" else 0, picture(2))
        np.testing.assert_array_equal(dataset.inputs, expected)


def test_gray_images_become_rgb_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_decode, "_CHUNK", 60)
    files = {f"{i:02}.png": encoded(picture(i, channels=3 if i == 17 else 1)) for i in range(20)}
    calls = []
    dataset, _ = load(tree(tmp_path / "tree", files), progress=lambda done, total: calls.append((done, total)))
    np.testing.assert_array_equal(dataset.inputs[17], picture(17))
    for i in {*range(20)} - {17}:
        np.testing.assert_array_equal(dataset.inputs[i], np.repeat(picture(i, channels=1)[..., None], 3, axis=-1))
    assert calls[-1] == (20, 20)
    assert {total for _, total in calls} == {20}


AS_IT_IS = ImageOptions()


def shape_and_values(image, form=AS_IT_IS, suffix="png"):
    buffer = io.BytesIO()
    image.save(buffer, suffix)
    array = decode_image(buffer.getvalue(), form).pixels
    assert array.dtype == np.uint8
    return array.shape, array.reshape(-1, array.shape[-1]).tolist()


def test_pixel_modes_are_converted():
    """Two pixels in each pixel mode."""
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert shape_and_values(bits) == ((1, 2, 1), [[0], [255]])
    grey_alpha = Image.fromarray(np.array([[[7, 255], [9, 255]]], np.uint8))
    assert shape_and_values(grey_alpha) == ((1, 2, 1), [[7], [9]])
    alpha = Image.fromarray(np.array([[[1, 2, 3, 255], [4, 5, 6, 255]]], np.uint8))
    assert shape_and_values(alpha) == ((1, 2, 3), [[1, 2, 3], [4, 5, 6]])
    wide = Image.fromarray(np.array([[0, 65535, 32768, 257 * 7 + 128, 257 * 7 + 129]], np.uint16))
    assert shape_and_values(wide) == ((1, 5, 1), [[0], [255], [128], [7], [8]])
    cmyk = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 255, 255, 0]]], np.uint8), "CMYK")
    assert shape_and_values(cmyk, suffix="tiff") == ((1, 2, 3), [[255, 255, 255], [255, 0, 0]])
    for palette, expected in ([9, 9, 9, 4, 4, 4], [[9], [4]]), ([9, 9, 9, 4, 4, 5], [[9, 9, 9], [4, 4, 5]]):
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette(palette)
        assert shape_and_values(image) == ((1, 2, len(expected[0])), expected)
    assert shape_and_values(alpha, ImageOptions(channels=1)) == ((1, 2, 1), [[2], [5]])
    assert shape_and_values(bits, ImageOptions(channels=3)) == ((1, 2, 3), [[0] * 3, [255] * 3])


@pytest.mark.parametrize(
    ("array", "message"),
    [(np.array([[0.5]], np.float32), "floats"), (np.array([[0, 65536]], np.int32), "more than 16 bits")],
)
def test_pixel_modes_without_a_scale_are_refused(array, message):
    with pytest.raises(Unreadable, match=message):
        decode_image(encoded(array, "tiff"), ImageOptions())


def test_formats_that_start_a_program_are_refused():
    with pytest.raises(Unreadable, match="not an image of a known format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", ImageOptions())


# One size for all.


def test_images_of_different_sizes_are_refused(tmp_path):
    files = contents(TRAIN + TEST) | {"train/bee/0.png": encoded(picture(9, size=(5, 6)))}
    for source in both(tmp_path, files):
        message = "one size; got train/ant/a.png of 4x6 and train/bee/0.png of 5x6 (height x width): "
        with pytest.raises(InputError, match=re.escape(f"{message}{source},size=32 gives all that size")):
            load_data(source)
        assert load_data(f"{source},size=8").inputs.shape == (7, 8, 8, 3)
        assert load_data(f"{source},size=3x5,channels=1").inputs.shape == (7, 3, 5, 1)


def test_resizing_is_antialiased(tmp_path):
    board = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(200)
    source = tree(
        tmp_path / "tree", {"a.png": encoded(board.astype(np.uint8)), "b.png": encoded(picture(0, (8, 8), 1))}
    )
    dataset, _ = load(f"{source},size=8")
    np.testing.assert_array_equal(dataset.inputs[1, ..., 0], picture(0, (8, 8), 1))  # untouched
    assert np.abs(dataset.inputs[0, 2:-2, 2:-2].astype(int) - 100).max() <= 2  # antialiased


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("DIR", ("DIR", ImageOptions())),
        ("a,b", ("a,b", ImageOptions())),
        ("DIR,size=32", ("DIR", ImageOptions((32, 32)))),
        ("a.zip,size=32x48,channels=3", ("a.zip", ImageOptions((32, 48), 3))),
        ("a,b,channels=1", ("a,b", ImageOptions(channels=1))),
        ("a,size=3/b", ("a,size=3/b", ImageOptions())),
        ("there,size=3", ("there,size=3", ImageOptions())),
        ("there,size=3,size=4", ("there,size=3", ImageOptions((4, 4)))),
    ],
)
def test_options_are_separated_from_the_place(place, expected):
    assert parse_place(place, lambda place: place == "there,size=3") == expected


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("D,size=0", "a height and a width; got '0': try 32 or 32x48"),
        ("D,size=3x0", "a height and a width; got '3x0'"),
        ("D,size=big", "a height and a width; got 'big'"),
        ("D,channels=2", "is 1 or 3; got '2'"),
        ("D,sizes=3", "options of a source of images are size, .*; got sizes: try size=32"),
    ],
)
def test_bad_options_are_refused(place, message):
    with pytest.raises(InputError, match=message):
        load_data(f"folder:{place}")
