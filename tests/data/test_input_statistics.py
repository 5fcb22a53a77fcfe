"""Statistics by which students standardize inputs, and columns that float32 cannot resolve."""

import numpy as np
import pytest

from ev3_distill.data import input_statistics
from ev3_distill.data.sources import load_data
from ev3_distill.data.sources.row_file import Part, RowFile
from ev3_distill.errors import InputError


def test_vectors_are_standardized_by_column_from_the_given_rows_alone():
    inputs = np.array([[1, 7], [3, 7], [1e9, 1e9]], np.float32)
    assert input_statistics(inputs, np.array([0, 1])) == {"mean": [2.0, 7.0], "scale": [1.0, 1.0]}  # 7 is constant
    inputs = np.array([[0, 51], [0, 153]], np.uint8)  # counts as x / 255: 0.2 and 0.6
    statistics = input_statistics(inputs, np.arange(2))
    assert statistics["scale"][0] == 1.0
    np.testing.assert_allclose([statistics["mean"][1], statistics["scale"][1]], [0.4, 0.2], rtol=1e-6)


def test_statistics_are_exact_for_columns_of_very_different_scales(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(5000, 4)) * [1, 1e4, 1e-3, 1] + [0, 1e6, 0.5, 1e5]).astype(np.float32)
    rows = np.sort(rng.permutation(5000)[:3000])
    expected = inputs[rows].astype(np.float64)
    monkeypatch.setattr("ev3_distill.data.statistics._CHUNK", 16 * 700)  # several parts, the last one short
    statistics = input_statistics(inputs, rows)
    np.testing.assert_allclose(statistics["mean"], expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["scale"], expected.std(0), rtol=1e-6)
    path = tmp_path / "rows"
    path.write_bytes(inputs.tobytes())
    assert input_statistics(RowFile((Part(path, 0, 5000),), (4,), np.dtype(np.float32)), rows) == statistics


def test_sequences_are_standardized_by_channel():
    inputs = np.array([[[1, 10], [3, 10]], [[5, 30], [7, 30]]], np.float32)
    statistics = input_statistics(inputs, np.arange(2))
    assert statistics["mean"] == [4.0, 20.0]
    np.testing.assert_allclose(statistics["scale"], [5**0.5, 10.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("largest", "scale"), [(1, None), (-2.6, None), (9, 15), (254, 255), (255, 255), (-1000, 1023), (65535, 65535)]
)
def test_images_are_divided_by_the_range_of_their_bits(largest, scale):
    inputs = np.zeros((3, 2, 2, 1), np.float32)
    inputs[1, 0, 1] = largest
    expected = None if scale is None else {"mean": [0.0], "scale": [float(scale)]}
    assert input_statistics(inputs, np.arange(3)) == expected


def test_bytes_of_images_stay_as_they_are():
    assert input_statistics(np.full((3, 2, 2, 1), 255, np.uint8), np.arange(3)) is None


def table(tmp_path, **columns):
    rng, path = np.random.default_rng(0), tmp_path / "table.npz"
    inputs = np.stack([rng.normal(size=300), *columns.values()], axis=1)
    np.savez(path, inputs=inputs, labels=np.arange(300) % 2)
    return path


def test_columns_that_float32_cannot_resolve_are_refused_with_the_constant_to_subtract(tmp_path):
    rng = np.random.default_rng(1)
    time = 1.7e9 + rng.normal(size=300)
    time[::50] = 0  # missing values: the standard deviation alone would hide what is lost
    path = table(tmp_path, time=time)
    message = (
        r"apart near 17000000.*column 1 \(1.2\d* wide at 17.*inputs\[:, 1\] -= 1700000000, and add it again in the t"
    )
    with pytest.raises(InputError, match=message):
        load_data(f"npz:{path}")
    np.savez(path, inputs=np.arange(300)[:, None] // 9 + 2**40, labels=np.arange(300) % 2)  # integers, too
    with pytest.raises(InputError, match=r"column 0 .*inputs\[:, 0\] -= 10995116277"):
        load_data(f"npz:{path}")


def test_columns_that_float32_resolves_are_not_refused(tmp_path):
    rng = np.random.default_rng(1)
    path = table(
        tmp_path,
        constant=np.full(300, 1.7e9 + 1 / 3),
        binary=rng.integers(0, 2, 300),
        rare=(np.arange(300) == 7) * 1.0,
        money=1e6 + rng.normal(size=300) * 100,
        years=rng.integers(1950, 2020, 300),
        ids=rng.integers(0, 2**40, 300),
        tiny=rng.normal(size=300) * 1e-30,
    )
    assert load_data(f"npz:{path}").inputs.shape == (300, 8)
