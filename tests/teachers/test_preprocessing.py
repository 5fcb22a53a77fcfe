"""Preprocessing: the steps and their order, the TOML file beside a teacher, and errors for what does not fit."""

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from ev3_distill.cli.options import CompressCommand
from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.preprocessing import (
    IDENTITY,
    canonical,
    command_line_options,
    merge,
    preprocess,
    read_preprocessing_file,
    resize_images,
    resolve,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(2, 4, 6, 3), dtype=np.uint8)


def test_bytes_become_pixels_in_0_to_1_and_floats_stay():
    np.testing.assert_array_equal(preprocess(IMAGES, IDENTITY), IMAGES.astype(np.float32) / 255)
    floats = RNG.random((3, 5)).astype(np.float32)
    np.testing.assert_array_equal(preprocess(floats, IDENTITY), floats)
    assert preprocess(IMAGES, IDENTITY).dtype == np.float32


def test_the_steps_run_in_their_order():
    """By hand: one gray pixel 0.2 -> RGB -> times 10 -> minus (1, 2, 3) -> divided by 2."""
    pixel = np.full((1, 1, 1, 1), 51, np.uint8)
    steps = Preprocessing(channels=3, resize=(2, 2), scale=10, mean=(1, 2, 3), std=(2,), layout="NCHW")
    got = preprocess(pixel, steps)
    assert got.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(got[0, :, 1, 0], [0.5, 0, -0.5], atol=1e-6)


def test_gray_is_luma_and_bgr_is_reversed_before_mean_and_std():
    pixel = np.array([[[[255, 0, 51]]]], np.uint8)
    np.testing.assert_allclose(preprocess(pixel, Preprocessing(channels=1)).ravel(), [0.299 + 0.114 * 0.2], atol=1e-6)
    got = preprocess(pixel, Preprocessing(order="BGR", mean=(0.2, 0, 0), std=(1, 1, 2)))
    np.testing.assert_allclose(got.ravel(), [0, 0, 0.5], atol=1e-6)
    np.testing.assert_array_equal(preprocess(pixel, Preprocessing(channels=3)), preprocess(pixel, IDENTITY))


def test_black_and_white_are_exchanged_by_a_negative_scale():
    got = preprocess(IMAGES, Preprocessing(scale=-1, mean=(-1,)))
    np.testing.assert_allclose(got, 1 - IMAGES / np.float32(255), atol=1e-6)


@pytest.mark.parametrize(("layout", "axes"), [
    ("NHWC", (0, 1, 2, 3)), ("NCHW", (0, 3, 1, 2)), ("NWHC", (0, 2, 1, 3)), ("NCWH", (0, 3, 2, 1)),
])  # fmt: skip
def test_layouts(layout, axes):
    got = preprocess(IMAGES, Preprocessing(layout=layout))
    np.testing.assert_array_equal(got, (IMAGES / np.float32(255)).transpose(axes))
    assert got.flags.c_contiguous
    sequences = RNG.random((2, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(preprocess(sequences, Preprocessing(layout="NCHW")), sequences.transpose(0, 2, 1))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_resizing_agrees_with_torch(height, width, new_height, new_width):
    torch = pytest.importorskip("torch", reason="the reference for resizing")
    images = RNG.random((2, height, width, 3)).astype(np.float32)
    reference = torch.nn.functional.interpolate(
        torch.tensor(images.transpose(0, 3, 1, 2)), (new_height, new_width), mode="bilinear", antialias=True
    )
    got = resize_images(images, (new_height, new_width))
    assert got.shape == (2, new_height, new_width, 3)
    np.testing.assert_allclose(got, reference.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_options_win_field_by_field():
    beside = Preprocessing(layout="NCHW", scale=255, mean=(1,), classes=("a", "b"))
    got = merge(Preprocessing(scale=1, mean=(0,), order="BGR"), beside)
    assert got == Preprocessing(layout="NCHW", scale=1, mean=(0,), order="BGR", classes=("a", "b"))
    assert canonical(got, (4, 6, 3)) == Preprocessing(layout="NCHW", order="BGR")
    same = Preprocessing(layout="NHWC", channels=3, resize=(4, 6), order="RGB", scale=1, mean=(0,), std=(1, 1, 1))
    assert canonical(same, (4, 6, 3)) == IDENTITY
    assert canonical(Preprocessing(channels=3), (4, 6, 1)) == Preprocessing(channels=3)


def test_the_toml_file_is_read(tmp_path):
    teacher = tmp_path / "net.onnx"
    assert read_preprocessing_file(teacher) == IDENTITY
    (tmp_path / "teacher.toml").write_text('mean = 1\nstd = [1, 2.5]\nresize = [3, 4]\nclasses = ["a"]\n')
    expected = Preprocessing(mean=(1.0,), std=(1.0, 2.5), resize=(3, 4), classes=("a",))
    assert read_preprocessing_file(teacher) == read_preprocessing_file(tmp_path) == expected
    (tmp_path / "net.toml").write_text('layout = "NCHW"\nchannels = 3\nscale = 255\norder = "BGR"\n')
    assert read_preprocessing_file(teacher) == Preprocessing(layout="NCHW", channels=3, scale=255.0, order="BGR")


@pytest.mark.parametrize(("text", "message"), [
    ("[", "net.toml cannot be read .*: fix it"),
    ("size = 3", "has the keys layout, channels, .*; got 'size' in .*net.toml: remove it"),
    ("scale = true", "'scale' in .* is a number; got True"),
    ("scale = [1]", r"'scale' in .* is a number; got \[1\]"),
    ('mean = ["a"]', "'mean' in .* is numbers"),
    ("resize = [1.5, 2]", "'resize' in .* is two integers"),
    ('classes = "cat"', "'classes' in .* is texts, such as"),
    ("layout = 3", "'layout' in .* is a text"),
    ('layout = "NHCW"', "net.toml: layout must be NHWC or NCHW"),
    ("std = [0]", "net.toml: std must be positive"),
    ("mean = [nan]", "net.toml: scale, mean and std must be finite"),
])  # fmt: skip
def test_bad_toml_files_are_refused(tmp_path, text, message):
    (tmp_path / "net.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_preprocessing_file(tmp_path / "net.onnx")


@pytest.mark.parametrize(("steps", "shape", "message"), [
    (Preprocessing(channels=3), (7,), r"channels is for images .*; s runs on examples \[7\]"),
    (Preprocessing(resize=(2, 2)), (7, 3), "resize is for images"),
    (Preprocessing(layout="NCHW"), (7,), "layout NCHW is not for examples"),
    (Preprocessing(layout="NCWH"), (7, 3), "layout NCWH is not for examples"),
    (Preprocessing(channels=3), (8, 8, 4), "the images have 4 channels: convert the data"),
    (Preprocessing(order="BGR"), (8, 8, 1), "order BGR is for 3 channels; the images have 1"),
    (Preprocessing(mean=(1, 2, 3)), (8, 8, 1), "one per channel, 1; got 3 for s: change it, or give --teacher-input.channels"),
])  # fmt: skip
def test_steps_that_do_not_apply_are_refused(steps, shape, message):
    with pytest.raises(InputError, match=message):
        resolve(steps, shape, None, source="s")


def test_the_layout_follows_from_the_shape_of_the_model():
    for model_shape, layout in (((3, 4, 6), "NCHW"), ((4, 6, 3), "NHWC"), ((3, None, None), "NCHW"), ((72,), "NHWC")):
        assert resolve(IDENTITY, (4, 6, 3), model_shape, source="s").layout == layout
    assert resolve(Preprocessing(layout="NCWH"), (4, 6, 3), (3, 6, 4), source="s").layout == "NCWH"
    assert resolve(IDENTITY, (9, 2), (2, 9), source="s").layout == "NCHW"
    assert resolve(IDENTITY, (9,), (9,), source="s") == IDENTITY
    assert resolve(IDENTITY, (4, 6, 3), None, source="s").layout == ""
    with pytest.raises(InputError, match=r"which fits both layouts: give --teacher-input.layout"):
        resolve(IDENTITY, (3, 3, 3), (3, 3, 3), source="s")
    with pytest.raises(InputError, match=r"s takes \[6, 4, 3\], .* in layout NHWC: give --teacher-input.layout NWHC"):
        resolve(Preprocessing(layout="NHWC"), (4, 6, 3), (6, 4, 3), source="s")


def test_the_command_line_reads_the_suggested_options():
    """Including negative numbers and names with spaces."""
    changes = {"scale": -1.0, "mean": (-0.5, -1.0, 0.25), "order": "BGR", "classes": ("a b", "c'd"), "resize": (3, 4)}

    import shlex

    read = tyro.cli(CompressCommand, args=shlex.split(command_line_options(changes)))
    assert read.run.teacher_input == Preprocessing(**changes)
