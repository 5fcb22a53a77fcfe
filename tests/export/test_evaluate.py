"""Evaluation of exported files: claims, guards, latency, and refusals."""

import re
import shutil

import exported_runs
import numpy as np
import onnx
import pytest
from exported_runs import error_of

from ev3_distill.data.sources import load_data
from ev3_distill.export import teacher_latency

of_images = exported_runs.of_images  # fixture


def test_evaluate_repeats_the_certificate_for_the_file(finished, cli, here):
    """On the sealed split of its run the claims are those of the certificate; guards are about the file."""
    assert cli("export", finished, "--format", "onnx", "--out", "out").code == 0
    of_run = cli("evaluate", finished, "--guard", "accuracy >= 0.5")
    answer = cli(
        *("evaluate", "out", "--of", finished, "--threads", 1, "--guard", "accuracy >= 0.5"),
        *("--guard", "bytes <= 9000", "--guard", "params <= 1000"),
    )
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert re.fullmatch(r"out/model.onnx: mlp:hidden=8, float32, [\d,]+ bytes, run by onnxruntime [\d.]+", lines[0])
    assert re.fullmatch(
        rf"the student of {finished}: the same answer on 359 of 359 examples, logits differ by at most .*", lines[1]
    )
    timed = [("", 1), ("", 64), (" of the teacher", 1), (" of the teacher", 64)]
    for line, (whose, size) in zip(lines[2:6], timed, strict=True):
        assert re.fullmatch(rf"latency{whose} at batch {size}: \S+ ms p50, \S+ ms p99, 1 thread, \d+ passes", line)
    assert lines[6:8] == of_run.out.splitlines()
    assert lines[8] == f"Guard bytes <= 9000: certified, {(here / 'out/model.onnx').stat().st_size:,} bytes"
    rest = load_data("digits")
    np.savez(here / "rest.npz", inputs=rest.inputs[:100] + np.float32(0.001), labels=rest.labels[:100])
    other = cli("evaluate", "out/model.onnx", "--data", "npz:rest.npz", "--guard", "accuracy >= 0.999")
    assert other.code == 3
    assert re.search(r"^accuracy: [\d.]+% of 100 examples; at least [\d.]+% with 95% confidence$", other.out, re.M)
    assert "NOT CERTIFIED" in other.out
    assert "the student of" not in other.out


@pytest.mark.parametrize("name", ["stablehlo", "flax"])
def test_evaluate_runs_stablehlo_and_flax_files(name, of_images, cli):
    own = ("--data", f"npz:{of_images / 'data.npz'}", "--keep-overlap")
    answer = cli("evaluate", of_images / name, *own, "--of", of_images / "run")
    assert answer.code == 3, answer.err
    assert "200 of 200 examples" in answer.err
    assert "the same answer on 200 of 200 examples" in answer.out
    assert "float32, " in answer.out
    assert "run by jax " in answer.out
    assert "latency of the teacher: " in answer.out


@pytest.mark.parametrize("kind", ["python", "onnx", "logits", "gone"])
def test_teachers_are_timed_if_they_can_run(kind, finished, of_images, here):
    """In a subprocess with the requested number of cores."""
    shutil.copytree(finished, here / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (here / "of_mine.py").write_text(
        "import os\nimport numpy as np\n\n\ndef logits(x):\n    print('chatter')\n"
        "    assert len(os.sched_getaffinity(0)) == 1\n    return np.zeros((len(x), 3))\n"
    )
    names = {"python": "python:of_mine:logits", "onnx": f"onnx:{of_images / 'onnx/model.onnx'}"}
    teacher = names.get(kind, f"{'onnx' if kind == 'gone' else kind}:gone.{kind}")
    config = (here / "run/config.toml").read_text()
    (here / "run/config.toml").write_text(config.replace('teacher = ""', f'teacher = "{teacher}"', 1))
    dataset = load_data(f"npz:{of_images / 'data.npz'}")
    times = teacher_latency.measure_teacher(here / "run", dataset, dataset.inputs[:5], batch_sizes=(1, 8), threads=1)
    if kind == "logits":
        assert times == "it cannot be timed, its logits were recorded (logits:gone.logits)"
    elif kind == "gone":
        assert "gone.gone" in times
    else:
        assert isinstance(times, dict), times
        assert list(times) == [1, 8]
        assert all(3 <= len(of) <= 301 and (of > 0).all() for of in times.values())


def test_damaged_and_foreign_files_are_refused(of_images, cli, here):
    data = ("--data", f"npz:{of_images / 'data.npz'}")
    content = bytearray((of_images / "onnx/model.onnx").read_bytes())
    (here / "cut.onnx").write_bytes(content[:700])
    assert "cut.onnx fails with " in error_of(cli("evaluate", "cut.onnx", *data))
    (here / "noise.stablehlo").write_bytes(b"\0" * 100)
    assert "noise.stablehlo fails with " in error_of(cli("evaluate", "noise.stablehlo", *data))
    assert "gone.onnx, which is missing or not a file" in error_of(cli("evaluate", "gone.onnx", *data))
    model = onnx.load(of_images / "onnx/model.onnx")
    del model.metadata_props[:]
    onnx.save(model, here / "foreign.onnx")
    assert "needs its metadata; foreign.onnx lacks format, precision" in error_of(
        cli("evaluate", "foreign.onnx", *data)
    )
    variables = (of_images / "flax/model.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(variables[:700])
    assert "exported variables need their program beside them; apply.stablehlo is missing" in error_of(
        cli("evaluate", "cut.safetensors", *data)
    )
    shutil.copy(of_images / "flax/apply.stablehlo", here)
    assert "cut.safetensors fails with SafetensorError" in error_of(cli("evaluate", "cut.safetensors", *data))
    shutil.copytree(of_images / "flax", here / "variables")
    with (here / "variables/apply.stablehlo").open("ab") as file:
        file.write(b"x")
    assert "apply.stablehlo was changed or damaged" in error_of(cli("evaluate", "variables/apply.stablehlo", *data))
    shutil.copytree(of_images / "onnx", here / "flipped")
    content[content.index(b"inputs") + 600] ^= 1
    (here / "flipped/model.onnx").write_bytes(content)
    assert "was changed or damaged" in error_of(cli("evaluate", "flipped", *data))


def test_impossible_evaluations_are_refused(of_images, finished, cli, here):
    file, data = of_images / "onnx", ("--data", f"npz:{of_images / 'data.npz'}")
    assert "name data with --data, or the run of the file with --of RUN" in error_of(cli("evaluate", file))
    assert "a guard on agreement needs the teacher" in error_of(
        cli("evaluate", file, *data, "--guard", "agreement >= 0.5")
    )
    assert "a guard on worst_group_accuracy needs groups" in error_of(
        cli("evaluate", file, *data, "--guard", "worst_group_accuracy >= 0.5")
    )
    assert "has no student" in error_of(cli("evaluate", file, *data, "--of", finished))
    assert "the student takes inputs of shape [16, 16, 2]" in error_of(cli("evaluate", file, "--data", "digits"))
    assert "--of and --threads are about an exported file" in error_of(cli("evaluate", finished, "--threads", 1))
    (here / "old").mkdir()
    (here / "old/evidence.json").write_text("{}")
    assert "is an export of an older version, without a file" in error_of(cli("evaluate", "old", *data))
    assert "try 0.95" in error_of(cli("evaluate", file, *data, "--confidence", 2))
    np.savez(here / "real.npz", inputs=np.zeros((9, 16, 16, 2), np.float32), labels=np.arange(9) % 3)
    assert "inputs of the dtype of its run's data, uint8" in error_of(cli("evaluate", file, "--data", "npz:real.npz"))
