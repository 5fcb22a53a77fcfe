"""Transparency, 16-bit files, EXIF orientation and frames: pixels by hand, warnings, fingerprints."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from image_files import contents, encoded, load, picture, tree
from PIL import Image

from ev3_distill.config import Compress
from ev3_distill.config_file import read_finished_config
from ev3_distill.data.sources import load_data
from ev3_distill.data.sources.image_decode import decode_image
from ev3_distill.data.sources.image_options import ImageOptions, parse_place
from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")


def saved(image, suffix="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


def decoded(content, **options):
    """The pixels as lists, and the traits."""
    pixels, traits = decode_image(content, ImageOptions(**options))
    assert pixels.dtype == np.uint8
    return pixels.reshape(-1, pixels.shape[-1]).tolist(), traits


# Transparency. A pixel of color c and opacity a over b is (c a + b (255 - a)) / 255, rounded.

RGBA = saved(Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 51], [10, 20, 30, 255]]], np.uint8)))


@pytest.mark.parametrize(
    ("background", "expected"),
    [
        ("", [[255] * 3, [206, 208, 210], [10, 20, 30]]),  # 255 - 51 * (255 - c) / 255 = 255 - (255 - c) / 5
        ("white", [[255] * 3, [206, 208, 210], [10, 20, 30]]),
        ("black", [[0] * 3, [2, 4, 6], [10, 20, 30]]),
        ("gray", [[128] * 3, [104, 106, 108], [10, 20, 30]]),  # 128 * .8 + c * .2 = 102.4 + c / 5
        ("ff0080", [[255, 0, 128], [206, 4, 108], [10, 20, 30]]),
        ("ignore", [[10, 20, 30]] * 3),
    ],
)
def test_transparent_pixels_are_composited(background, expected):
    pixels, traits = decoded(RGBA, background=background)
    assert pixels == expected
    assert traits.transparent == (background != "ignore")


def test_transparent_gray_stays_gray_on_a_gray_background():
    image = saved(Image.fromarray(np.array([[[7, 0], [7, 51], [7, 255]]], np.uint8)))
    assert decoded(image)[0] == [[255], [205], [7]]  # 204 + 1.4
    assert decoded(image, background="black")[0] == [[0], [1], [7]]
    assert decoded(image, background="ff0000")[0] == [[255, 0, 0], [205, 1, 1], [7, 7, 7]]
    assert decoded(image, channels=3)[0] == [[255] * 3, [205] * 3, [7] * 3]
    assert decoded(RGBA, channels=1)[0][0] == [255]


def modes_with_a_transparent_color():
    """A transparent pixel and an opaque one, in each mode of PNG that names what is transparent."""
    yield "L", Image.fromarray(np.array([[5, 9]], np.uint8)), 5, [[255], [9]]
    yield "1", Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), 0, [[255], [255]]
    yield "I;16", Image.fromarray(np.array([[5, 257 * 9]], np.uint16)), 5, [[255], [9]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    yield "RGB", rgb, (1, 2, 3), [[255] * 3, [4, 5, 6]]
    for name, palette, expected in (
        ("gray palette", [9, 9, 9, 4, 4, 4], [[255], [4]]),
        ("palette", [9, 9, 9, 4, 4, 5], [[255] * 3, [4, 4, 5]]),
    ):
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette(palette)
        yield name, image, 0, expected
        yield f"{name} with opacities", image, b"\x00\xff", expected


@pytest.mark.parametrize(("name", "image", "transparency", "expected"), list(modes_with_a_transparent_color()))
def test_a_transparent_color_is_composited(name, image, transparency, expected):
    pixels, traits = decoded(saved(image, transparency=transparency))
    assert (pixels, traits.transparent) == (expected, True)
    unused = 77 if isinstance(transparency, int) and "palette" not in name and name != "1" else None
    if unused:  # a color that no pixel has
        without, traits = decoded(saved(image, transparency=unused))
        assert (without, traits.transparent) == (decoded(saved(image))[0], False)


def test_icons_drawn_in_alpha_differ(tmp_path):
    """Black everywhere, with the drawing in the opacity."""
    icons = {}
    for i in range(3):
        rgba = np.zeros((4, 6, 4), np.uint8)
        rgba[..., 3] = picture(i, channels=1)
        icons[f"{i}.png"] = encoded(rgba)
    source = tree(tmp_path / "tree", icons)
    dataset, warnings = load(source)
    for i in range(3):
        np.testing.assert_array_equal(dataset.inputs[i, ..., 0], 255 - picture(i, channels=1))
    assert len(warnings) == 1
    assert "3 of 3 images have transparent pixels, such as 0.png; they are drawn on white: ,background=" in warnings[0]
    assert load(source)[1] == warnings  # from the cache
    same, warnings = load(f"{source},background=white")
    assert (same.fingerprint, warnings) == (dataset.fingerprint, [])
    black, warnings = load(f"{source},background=black")
    assert black.inputs.max() == 0
    assert len(warnings) == 1
    assert "all of 3 examples are the same, so nothing can be learned" in warnings[0]
    assert len({dataset.fingerprint, black.fingerprint, load(f"{source},background=ignore")[0].fingerprint}) == 3


def test_opaque_alpha_changes_nothing(tmp_path):
    files = {f"{i}.png": encoded(np.dstack([picture(i), np.full((4, 6), 255, np.uint8)])) for i in range(3)}
    source = tree(tmp_path / "tree", files)
    dataset, warnings = load(source)
    np.testing.assert_array_equal(dataset.inputs, [picture(i) for i in range(3)])
    assert warnings == []
    assert load(f"{source},background=black")[0].fingerprint == dataset.fingerprint


# 16-bit files.


def png_of_16_bits(array):
    """A PNG file [H, W, C]; Pillow writes none in color."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_bits_scale_gray_values():
    levels = np.array([[0, 1, 16, 2048, 4095]], np.uint16)
    for content in (saved(Image.fromarray(levels)), saved(Image.fromarray(levels), "tiff")):
        assert decoded(content)[0] == [[0], [0], [0], [8], [16]]  # of 65,535
        pixels, traits = decoded(content, bits=12)
        assert pixels == [[0], [0], [1], [128], [255]]  # v * 255 / 4095
        assert (traits.maximum, traits.scaled) == (4095, True)
        with pytest.raises(Unreadable, match="its largest value, 4095, has more than 10 bits"):
            decoded(content, bits=10)
    assert decoded(encoded(picture(0)), bits=12)[0] == picture(0).reshape(-1, 3).tolist()  # 8 bits stay


def test_bits_scale_colors():
    colors = np.array([[[0, 16, 4095], [2048, 256, 255]]])
    opaque = np.dstack([colors, np.full((1, 2, 1), 65535)])
    for content in (png_of_16_bits(colors), png_of_16_bits(opaque)):
        assert decoded(content)[0] == [[0, 0, 15], [8, 1, 0]]  # the high bytes
        pixels, traits = decoded(content, bits=12)
        assert pixels == [[0, 1, 255], [128, 16, 16]]
        assert traits.maximum == 4095
    clear = np.dstack([colors, [[0, 65535]]])
    assert decoded(png_of_16_bits(clear), bits=12)[0] == [[255, 255, 255], [128, 16, 16]]
    with pytest.raises(Unreadable, match="`bits` cannot be applied to its kind of 16-bit pixels, LA;16B"):
        decoded(png_of_16_bits(opaque[..., [0, 3]]), bits=12)


def tiff_of_12_bits(values):
    """An uncompressed TIFF file of two pixels a strip, three bytes for two of them."""
    a, b = values
    data = bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 1),
        (258, 3, 1, 12),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
    ]
    tags += [(278, 3, 1, 1), (279, 4, 1, 3)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 12) + data + b"\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_files_that_say_12_bits_are_scaled():
    pixels, traits = decoded(tiff_of_12_bits([4095, 2048]))
    assert (pixels, traits.scaled) == ([[255], [128]], True)


@pytest.mark.parametrize(("highest", "bits"), [(4095, 12), (1000, 10), (255, 8), (16_383, 14), (100, 8), (20_000, 0)])
def test_unused_bits_are_told(tmp_path, highest, bits):
    values = np.linspace(0, highest, 24).astype(np.uint16).reshape(4, 6)
    source = tree(tmp_path / "tree", {"a.png": encoded(values), "b.png": encoded(values // 2)})
    dataset, warnings = load(source)
    warnings = [line for line in warnings if "same" not in line and "blank" not in line]  # of lost levels
    assert len(warnings) == bool(bits)
    confirmed, lines = load(f"{source},bits=16")
    assert confirmed.fingerprint == dataset.fingerprint
    assert not any("levels are lost" in line for line in lines)
    if bits:
        assert f"their largest value is {highest:,} of 65,535, in a.png: " in warnings[0]
        assert f",bits={bits} after the source" in warnings[0]
        scaled, none = load(f"{source},bits={bits}")
        assert not any("levels are lost" in line for line in none)
        assert scaled.fingerprint != dataset.fingerprint
        assert scaled.inputs.max() == round(highest * 255 / (2**bits - 1))


# EXIF orientation.

UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
STORED = {  # how a camera stores the upright image, by orientation (EXIF 2.3, table of tag 274)
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),  # the camera's top is at the right: turned counterclockwise
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


def photo(array, orientation, suffix="png", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(array), suffix, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_turned_upright(orientation):
    content = photo(STORED[orientation], orientation)
    pixels, traits = decode_image(content, ImageOptions())
    np.testing.assert_array_equal(pixels[..., 0], UPRIGHT)
    assert traits.turned == (orientation > 1)
    pixels, traits = decode_image(content, ImageOptions(orientation="ignore"))
    np.testing.assert_array_equal(pixels[..., 0], STORED[orientation])
    assert not traits.turned


@pytest.mark.parametrize("suffix", ["jpeg", "webp", "tiff", "avif"])
def test_photos_of_all_formats_are_turned(suffix):
    smooth = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (1, 16, 3))  # 32 x 16
    pixels = decode_image(photo(np.rot90(smooth).copy(), 6, suffix), ImageOptions()).pixels
    assert np.abs(pixels.astype(int) - smooth).max() < 12


def test_sizes_are_compared_after_turning(tmp_path):
    source = tree(tmp_path / "tree", {"a.png": photo(UPRIGHT, 1), "b.png": photo(STORED[6], 6)})
    dataset, warnings = load(source)
    np.testing.assert_array_equal(dataset.inputs[..., 0], [UPRIGHT, UPRIGHT])
    assert [w for w in warnings if "the same" not in w] == []
    with pytest.raises(InputError, match=r"got a\.png of 2x3 and b\.png of 3x2"):
        load_data(f"{source},orientation=ignore")
    sized = [load(f"{source},size=2x3{option}")[0] for option in ("", ",orientation=ignore")]
    assert sized[0].fingerprint != sized[1].fingerprint


# Other oddities, options and fingerprints.


def test_files_of_several_frames_are_told(tmp_path):
    frames = [Image.fromarray(picture(i)) for i in range(2)]
    files = {
        f"{s}.{s}": saved(frames[0], s, save_all=True, append_images=frames[1:]) for s in ("gif", "tiff", "webp", "png")
    }
    _, warnings = load(tree(tmp_path / "tree", files))
    assert len(warnings) == 1
    assert "4 images have several frames, such as gif.gif; the first one is used" in warnings[0]


def test_more_suffixes_are_read(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (1, 32, 3))
    formats = {"1.jfif": "jpeg", "2.JPE": "jpeg", "3.avif": "avif", "4.Png": "png"}
    dataset, _ = load(tree(tmp_path / "tree", {name: encoded(smooth, suffix) for name, suffix in formats.items()}))
    assert np.abs(dataset.inputs.astype(int) - smooth).max() < 12


@pytest.mark.parametrize("option", ["background=white", "background=black", "orientation=ignore", "bits=12", ""])
def test_options_without_effect_keep_the_fingerprint(tmp_path, option):
    """It is that of earlier versions, so that their runs go on: names, contents, size and channels."""
    files = contents(["a.png", "b.png"])
    source = tree(tmp_path / "tree", files)
    lines = [hashlib.sha256(name.encode() + b"\0" + hashlib.sha256(files[name]).digest()) for name in sorted(files)]
    content = json.dumps([1, hashlib.sha256(b"".join(line.digest() for line in lines)).hexdigest(), [None, 0]])
    expected = hashlib.sha256(json.dumps([content, []]).encode()).hexdigest()
    assert load(f"{source},{option}" if option else source)[0].fingerprint == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("background=pink", r"is white, black, gray, RRGGBB or ignore; got 'pink': try background=black"),
        ("background=", r"RRGGBB or ignore; got ''"),
        ("bits=4", r"bits of a source of images is 8 to 16; got '4': try bits=12"),
        ("bits=x", r"got 'x'"),
        ("orientation=6", r"orientation of a source of images is apply or ignore; got '6'"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        parse_place(f"D,{option}", lambda _: False)


def test_older_runs_read_the_stored_pixels(tmp_path):
    rgba = np.dstack([STORED[6]] * 3 + [np.array([[0, 255], [99, 255], [255, 255]], np.uint8)])
    source = tree(tmp_path / "tree", {"a.png": photo(rgba, 6), "b.png": photo(rgba[::-1].copy(), 6)})
    older, warnings = load(source, stored_pixels=True)
    np.testing.assert_array_equal(older.inputs[0, ..., 0], STORED[6])
    assert warnings == []
    by_options, warnings = load(f"{source},background=ignore,orientation=ignore")
    assert (by_options.fingerprint, warnings) == (older.fingerprint, [])
    assert load(f"{source},background=black,orientation=apply", stored_pixels=True)[0].inputs.shape == (2, 2, 3, 3)
    deep = tree(tmp_path / "deep", {"a.tiff": tiff_of_12_bits([4095, 2048]), "b.tiff": tiff_of_12_bits([0, 4095])})
    assert load(deep, stored_pixels=True)[0].inputs.ravel().tolist() == [16, 8, 0, 16]
    assert load(deep)[0].inputs.ravel().tolist() == [255, 128, 0, 255]


def test_runs_without_the_key_are_older(tmp_path):
    (tmp_path / "config.toml").write_text('data = "digits"\n')
    assert read_finished_config(Compress, tmp_path).stored_pixels
    assert not Compress().stored_pixels
