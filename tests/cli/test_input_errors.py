"""Invalid input gives one clear error and writes nothing. Each error names the rule, the value and the way out."""

import re

import numpy as np
import pytest
from refused_inputs import refused, save_npz

ROWS, CLASSES = 1797, 10


# The command line.


def test_unknown_option(cli, here):
    answer = cli("compress", "--colour", "red")
    assert answer.code == 2
    assert "Unrecognized options: --colour" in answer.err
    assert not list(here.iterdir())


@pytest.mark.parametrize("argv", [[], ["shrink"]])
def test_unknown_command(cli, here, argv):
    answer = cli(*argv)
    assert answer.code == 2
    for name in ("compress", "teach", "evaluate", "report", "bench"):
        assert name in answer.err


def test_resume_without_a_value(cli, here):
    answer = cli("compress", "--resume")
    assert answer.code == 2
    assert "--resume" in answer.err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--budget", "ten", r"a budget must be a positive number of steps \(2000\).*; got 'ten': try 2000"),
        ("--budget", "-3", "got '-3': try 2000"),
        ("--budget", "nan", "got 'nan': try 2000"),
        ("--budget", "1.5", r"got '1\.5': try 2000"),
        ("--budget", "900000000e", r"a budget must be below 1073741824 steps; got '900000000e', \d+ steps: give less"),
        ("--teacher-budget", "0", "got '0': try 2000"),
        ("--seed", "-1", r"seed must be 0 to 2\^31 - 1; got -1: try 0"),
        ("--confidence", "95", "confidence must be at least 0.5 and below 1; got 95.0: try 0.95"),
        ("--deliver", "newest", "deliver must be best or champion; got 'newest': try best"),
        ("--test", "0", r"the fraction of every split must be positive; got .*: raise the one that is not"),
        ("--delta", "2", "delta must be a probability above 0 and below 1; got 2.0: try 0.05"),
        ("--arms", "sgd", r"an arm is one of ce, .*, or a mix .* of kd, .*; got 'sgd': for example 0\.7\*kd\+0\.3\*ce"),
        ("--arms", "0.5*kd+ce", r"an arm is one of ce, .*; got '0\.5\*kd\+ce'"),
        ("--arms", "1*kd@0", r"an arm is one of ce, .*; got '1\*kd@0'"),
        ("--data", "mnist", "a data source is digits, npz:FILE, .* or tfds:NAME; got 'mnist': name one of these"),
        ("--data", "npz:no.npz", "got no.npz, which does not exist or is not a file: check the path"),
        (
            "--teacher",
            "torch:x.pt",
            r"torch:FILE needs a file; got 'x.pt', which does not exist or is not a file: check the path",
        ),
        ("--teacher", "flax:", r"a teacher is KIND:PLACE with a KIND of onnx, .* or logits; got 'flax:': for example"),
        ("--teacher", "logits:no.npz", "got no.npz, which does not exist or is not a file: check the path"),
        ("--teacher", "flax:nowhere", r"nowhere has no readable spec.json .*: name a finished run"),
        ("--student", "cnn", r"a student is one of mlp.* or MODULE:FACTORY; got 'cnn': for example"),
        ("--student", ":make", r"got ':make': for example"),
        ("--student", "mlp:width=3", "the options of mlp are hidden; got width: use one of those"),
        ("--student", "mlp:hidden=big", r"NAME=INTEGER .*got 'hidden=big' in 'mlp:hidden=big': try mlp:hidden=32-32"),
        ("--student", "mlp:hidden=0", r"with integers from 1; got 'hidden=0'"),
        ("--teacher-network", "cnn", r"got 'cnn': for example"),
    ],
)
def test_bad_option(cli, here, option, value, says):
    refused(cli, here, "compress", f"{option}={value}", says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sedd = 1", r"a configuration has the keys data, .*; got 'sedd' in bad.toml: remove it"),
        (
            "[ev3]\nbatch = 1",
            r"a configuration has the keys batch_size, .*; got 'batch' in \[ev3\] of bad.toml: remove it",
        ),
        ("seed = '1'", "'seed' in bad.toml must be an integer; got '1': write it like 0"),
        ("seed = true", "'seed' in bad.toml must be an integer; got True: write it like 0"),
        ("arms = [1]", r"'arms' in bad.toml must be a list; got \[1\]"),
        ("ev3 = 3", r"'ev3' in bad.toml must be a table; got 3: write \[ev3\]"),
        ("[splits]\ntest = 0.5", r"the fractions of the splits must sum to 1; got 1\.3.*: rescale them"),
        ("seed = ", r"a configuration must be a TOML file; bad.toml is not \(.*\): fix it"),
        (b"\xff\xfe", r"a configuration must be a TOML file; bad.toml is not \(.*\): fix it"),
    ],
)
def test_bad_configuration(cli, here, text, says):
    (here / "bad.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(cli, here, "compress", "--config", "bad.toml", says=says)


def test_missing_configuration(cli, here):
    refused(cli, here, "compress", "--config=no.toml", says=r"readable TOML file; got no.toml \(No such file")


# The data.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": None}, "needs labels; npz:data.npz has none: name a --teacher, or data with labels"),
        ({"inputs": np.array([None, "x"], object)}, "got Python objects in 'inputs': save it with a plain dtype"),
        (
            {"labels": np.arange(60) % 3 - 2},
            "labels must not be negative, except for -1 where an example has none; got -2 in row 0: number classes from 0",
        ),
        (
            {"class_names": np.array(["a", "b"])},
            "labels must be below the number of class_names, 2; got 2 in row 2: add names or fix labels",
        ),
        ({"labels": np.arange(59) % 3}, r"must have the same length .*; got \[60, 4\] and \[59\]: pair them up"),
        (
            {"inputs": np.where(np.arange(240).reshape(60, 4) == 165, np.nan, 1.0)},
            "inputs must be finite; got nan or infinity in row 41: repair or remove that example",
        ),
        (
            {"labels": np.linspace(0, 2, 60)},
            "labels must be integers or text; got float64 such as .* of a regression",
        ),
    ],
)
def test_bad_data(cli, here, changes, says):
    save_npz(here / "data.npz", **changes)
    refused(cli, here, "compress", "--data", "npz:data.npz", "--out", "run", says=says)
    refused(cli, here, "teach", "--data", "npz:data.npz", "--out", "run", says=says)


def test_too_few_examples(cli, here):
    save_npz(here / "data.npz", rows=4)
    says = "got 4 examples, too few for .*: give at least 7, or other fractions"
    refused(cli, here, "compress", "--data", "npz:data.npz", "--out", "run", says=says)


def test_truncated_data(cli, here):
    save_npz(here / "data.npz")
    whole = (here / "data.npz").read_bytes()
    (here / "data.npz").write_bytes(whole[: len(whole) // 2])
    refused(
        cli, here, "compress", "--data", "npz:data.npz", says="must be a complete npz file; got one that cannot be read"
    )


# The teacher.


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (
            np.zeros((ROWS - 1, CLASSES)),
            f"one row per example, {ROWS}; got {ROWS - 1}: run the teacher on this data set",
        ),
        (
            np.zeros((ROWS, CLASSES + 1)),
            f"one output per class of the data, {CLASSES}; .* has {CLASSES + 1}: if it",
        ),
        (
            np.where(np.arange(ROWS)[:, None] == 77, np.inf, np.zeros((ROWS, CLASSES))),
            "logits must be finite; got nan or infinity in row 77: check the teacher",
        ),
        (np.array([None]), "got Python objects in 'logits'"),
    ],
)
def test_bad_logits(cli, here, logits, says):
    np.savez(here / "logits.npz", logits=logits)
    refused(cli, here, "compress", "--teacher", "logits:logits.npz", "--out", "run", says=says)


def test_logits_of_other_data(cli, here):
    np.savez(here / "logits.npz", logits=np.zeros((ROWS, CLASSES)), fingerprint=np.array("f00"))
    refused(cli, here, "compress", "--teacher", "logits:logits.npz", says="this data set, fingerprint .*; got f00: ")


def test_flax_teacher_of_other_data(cli, here, finished):
    save_npz(here / "data.npz")
    argv = ["compress", "--data", "npz:data.npz", "--teacher", f"flax:{finished}", "--out", "run"]
    refused(
        cli,
        here,
        *argv,
        says=r"must have the size of the examples; flax:.* takes \[8, 8, 1\], the examples are \[4\]: use another",
    )


# The user's own student.


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, r"got 'own_0:make', which fails with ModuleNotFoundError: No module named 'own_0': check the name"),
        ("1 +", r"got 'own_1:make', which fails with SyntaxError"),
        ("raise RuntimeError('at import')", r"got 'own_2:make', which fails with RuntimeError: at import"),
        ("x = 1", r"got 'own_3:make', which fails with AttributeError: .*'make'"),
        ("make = 7", r"MODULE:FACTORY; got 'own_4:make', which is of type int: name a function"),
        (
            "def make(input_shape, num_classes, rngs): raise KeyError('oh')",
            r"own_5:make .* fails with KeyError: 'oh': fix",
        ),
        ("def make(): pass", r"own_6:make .* fails with TypeError: make\(\) got an unexpected keyword"),
        ("def make(input_shape, num_classes, rngs): return 3", r"own_7:make .* fails with .*: fix the student"),
        (
            "from flax import nnx\n"
            "def make(input_shape, num_classes, rngs):\n"
            "    return nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(64, num_classes + 1, rngs=rngs))\n",
            r"float32 logits \[B, K\], here \[2, 10\] for 2 examples; own_8:make returns float32 \[2, 11\]: fix its last layer",
        ),
        (
            "from flax import nnx\n"
            "def make(input_shape, num_classes, rngs): return nnx.Linear(7, num_classes, rngs=rngs)\n",
            r"inputs \[B, 8, 8, 1\] to logits \[B, K\]; own_9:make .* fails with TypeError: ",
        ),
    ],
)
def test_bad_factory(cli, here, request, code, says):
    module = re.search(r"own_\d", says)[0]
    if code is not None:
        (here / f"{module}.py").write_text(code)
    refused(cli, here, "compress", "--student", f"{module}:make", "--out", "run", says=says)
    if module == "own_8":
        refused(cli, here, "compress", "--teacher-network", f"{module}:make", "--out", "run", says=says)
