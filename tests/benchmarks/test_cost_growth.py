"""The scaling suite: exponents agree with hand computation, and the teacher of its data knows the labels."""

import importlib.util

import numpy as np
import pytest

from ev3_distill.benchmarks import cost_growth
from ev3_distill.benchmarks.child_process import peak_memory
from ev3_distill.errors import InputError


def row(at, seed, ms, *, curve="classes"):
    return {"curve": curve, "at": at, "seed": seed, "ms_per_step": ms, "compile_s": 5.0, "wall_s": 7.0, "peak": 2**29}


def test_exponents_are_slopes_on_logarithmic_axes():
    rows = [row(at, seed, (2 + seed) * at**0.5) for at in (10, 100, 1000) for seed in (0, 1)]
    values = {at: [one for one in rows if one["at"] == at] for at in (10, 100, 1000)}
    assert cost_growth.exponents(values, "ms_per_step") == pytest.approx([0.5, 0.5])
    assert cost_growth.exponents(values, "compile_s") == pytest.approx([0, 0], abs=1e-12)


def test_table_compares_the_two_largest_settings_with_the_target():
    def text(last):
        return cost_growth.table([row(10, 0, 1.0), row(100, 0, 1.0), row(1000, 0, last)])

    assert text(10.0).endswith(
        "Steepest, between the two largest settings: 1.00; target ≤ 1, with 0.05 for noise: held."
    )
    assert text(20.0).endswith(
        "Steepest, between the two largest settings: 1.30; target ≤ 1, with 0.05 for noise: missed."
    )
    assert "| exponent, last | 1.00 | 0.00 | 0.00 | 0.00 |" in text(10.0)
    assert "| 1,000 | 10.000 | 5.0 | 7.0 | 512 |" in text(10.0)


def test_plot_has_a_panel_for_each_figure_and_curve():
    rows = [row(at, 0, 1.0, curve=curve) for curve in ("classes", "arms") for at in (1, 2)]
    assert len(cost_growth.plot(rows).axes) == 2 * len(cost_growth.FIGURES)


def test_unknown_curve_is_refused():
    with pytest.raises(InputError, match="--only of scaling takes training, classes, arms, held-out, pixels; got rows"):
        next(cost_growth.collect(seeds=1, size="smoke", only=["rows"]))


def test_only_one_curve_is_measured_and_rows_at_hand_are_not(monkeypatch):
    monkeypatch.setattr(cost_growth, "_run", lambda directory, seed, problem: {"arms": problem.arms})
    rows = list(cost_growth.collect(seeds=2, size="full", only=["arms"], done=[("arms", 1, 0)]))
    assert [(one["at"], one["arms"], one["seed"]) for one in rows if one["seed"] == 0] == [
        (n, n, 0) for n in (2, 4, 8, 16)
    ]
    assert len(rows) == 9
    pixels = cost_growth.collect(seeds=1, size="full", only=["pixels"])
    assert [one["at"] for one in pixels] == [side**2 for side in (8, 16, 32, 64, 128, 224)]


@pytest.mark.parametrize("side", [0, 8, 32])
def test_teacher_knows_the_labels_of_the_data(tmp_path, monkeypatch, side):
    problem = cost_growth.Problem(explore=80, held_out=40, classes=4, side=side)
    cost_growth.write_data(tmp_path, 0, problem)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("linear", tmp_path / "linear.py")
    teacher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(teacher)
    data = np.load(tmp_path / "data.npz")
    assert data["inputs"].shape == (200, side, side, 3) if side else (200, 16)
    assert (teacher.logits(data["inputs"]).argmax(1) == data["labels"]).mean() > 0.95
    assert np.bincount(data["labels"]).tolist() == [50] * 4


def test_memory_of_a_command_is_measured_and_its_failure_is_told(tmp_path):
    def python(code):
        return peak_memory(["python", "-c", code], directory=tmp_path, environment={"SIZE": "200"}, quiet=True)

    small, large = python("pass"), python("import os; x = bytearray(int(os.environ['SIZE']) * 2**20)")
    assert 180 * 2**20 < large - small < 260 * 2**20
    with pytest.raises(RuntimeError, match=r"ended with exit code 3:\nno luck"):
        python("import sys; print('no luck', file=sys.stderr); sys.exit(3)")
