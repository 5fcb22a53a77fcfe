"""Names of students: what each stands for, and which are refused."""

import pytest

from ev3_distill import students
from ev3_distill.errors import InputError

SHAPE, CLASSES = (8, 8, 1), 10


@pytest.mark.parametrize(
    ("text", "shape", "family", "options"),
    [
        ("auto", (5,), "mlp", {}),
        ("auto", (8, 8, 1), "mlp", {}),
        ("auto:hidden=3", (15, 64, 3), "mlp", {"hidden": [3]}),
        ("auto", (16, 16, 1), "resnet", {"depth": 8}),
        ("auto:width=4", (32, 32, 3), "resnet", {"depth": 8, "width": 4}),
        ("auto", (50, 2), "convnet1d", {}),
        ("resnet20", (32, 32, 3), "resnet", {"depth": 20}),
        ("resnet14:width=4", (8, 8, 3), "resnet", {"depth": 14, "width": 4}),
        ("convnet1d:filters=8", (9, 3), "convnet1d", {"filters": [8]}),
        ("mobilenet:blocks=1,width=100", (8, 8, 1), "mobilenet", {"blocks": [1], "width": 100}),
        ("vit:patch=8", (32, 32, 3), "vit", {"patch": 8}),
    ],
)
def test_names_become_families_and_options(monkeypatch, text, shape, family, options):
    monkeypatch.setattr("ev3_distill.students.naming.build", lambda spec: spec)
    wanted = {"family": family, **options, "input_shape": list(shape), "num_classes": CLASSES}
    assert students.from_name(text, shape, CLASSES) == wanted


@pytest.mark.parametrize(
    ("text", "shape", "says"),
    [
        ("cnn", SHAPE, "a student is one of mlp, .*, resnet8, auto or MODULE:FACTORY; got 'cnn': for example"),
        ("resnet9", (32, 32, 3), "depth is one of 8, 14, .*; got 9"),
        ("resnet8:depth=8", (32, 32, 3), "may be given once; got 'resnet8:depth=8'"),
        ("resnet8:size=8", (32, 32, 3), "the options of resnet are depth, width; got size: use one of those"),
        ("vit:depth=0", (32, 32, 3), "with integers from 1; got 'depth=0'"),
        ("resnet8", (5,), r"an image \[H, W, C\]; got shape \[5\]"),
        ("mobilenet", (7, 9, 1), r"at least 8x8; got shape \[7, 9, 1\]"),
        ("mobilenet", (32, 3), "an image"),
        ("mobilenet:blocks=1-1-1-1-1-1-1-1", (32, 32, 3), "1 to 7 stages"),
        ("conv4", (28, 15, 1), r"at least 16x16; got shape \[28, 15, 1\]"),
        ("vit", (32, 3), "an image"),
        ("vit:patch=5", (32, 30, 3), r"must divide height and width; got patch=5 for shape \[32, 30, 3\]"),
        (
            "vit:heads=5",
            (32, 32, 3),
            "heads of a vit must divide its width; got width=96, heads=5: try heads=4,width=96",
        ),
        ("transformer:width=6", (9, 3), "got width=6, heads=4: try heads=4,width=8"),
        ("transformer", (9,), r"a sequence \[L, C\]; got shape \[9\]"),
        ("convnet1d", (9, 9, 1), "a sequence"),
    ],
)
def test_invalid_names_are_refused(text, shape, says):
    with pytest.raises(InputError, match=says):
        students.from_name(text, shape, CLASSES)
