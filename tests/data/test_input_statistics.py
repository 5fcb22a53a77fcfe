"""Statistics by which students standardize inputs, and columns that float32 cannot resolve."""

import re

import numpy as np
import pytest

from ev3_distill.data import input_statistics
from ev3_distill.data.sources import load_data
from ev3_distill.data.sources.dataset import fingerprint
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


def loaded(path, **options):
    warnings = []
    return load_data(f"npz:{path}", warn=warnings.append, **options), warnings


def test_columns_that_float32_cannot_resolve_are_shifted_by_a_round_constant(tmp_path):
    rng = np.random.default_rng(1)
    time = 1.7e9 + rng.normal(size=300)
    path = table(tmp_path, time=time)
    data, warnings = loaded(path)
    assert data.offset.tolist() == [0, 1.7e9]
    np.testing.assert_array_equal(data.inputs[:, 1], (time - 1.7e9).astype(np.float32))
    np.testing.assert_array_equal(data.inputs[:, 0], np.random.default_rng(0).normal(size=300).astype(np.float32))
    assert len(warnings) == 1
    assert re.search(
        r"does not resolve column 1 \(1.\d+ wide\): subtracting 1700000000 from column 1 first", warnings[0]
    )
    np.savez(path, inputs=np.arange(300)[:, None] // 9 + 2**40, labels=np.arange(300) % 2)  # integers, too
    data, _ = loaded(path)
    assert data.offset.tolist() == [2**40 + 24]  # 1,099,511,627,800
    np.testing.assert_array_equal(data.inputs[:, 0], np.arange(300) // 9 - 24)
    np.savez(path, inputs=0.25 + 1e-9 * rng.normal(size=(300, 1)), labels=np.arange(300) % 2)
    data, _ = loaded(path)
    assert data.offset.tolist() == [0.25]


def test_the_offset_is_the_same_in_memory_and_on_disk_and_counts_in_the_fingerprint(tmp_path):
    time = 1.7e9 + np.random.default_rng(1).normal(size=300)
    data, _ = loaded(table(tmp_path, time=time))
    on_disk, _ = loaded(tmp_path / "table.npz", memory=0)
    assert isinstance(on_disk.inputs, RowFile)
    np.testing.assert_array_equal(on_disk.inputs[np.arange(300)], data.inputs)
    given, warnings = loaded(tmp_path / "table.npz", offset=[0.0, 1.7e9])
    assert not warnings
    assert data.fingerprint == on_disk.fingerprint == given.fingerprint
    other, _ = loaded(table(tmp_path, time=time - 1.7e9), offset=[])  # the same numbers after the shift
    np.testing.assert_allclose(other.inputs, data.inputs, atol=1e-6)
    np.savez(tmp_path / "shifted.npz", inputs=data.inputs, labels=data.labels)
    assert loaded(tmp_path / "shifted.npz")[0].fingerprint != data.fingerprint


def test_new_data_are_shifted_by_the_offset_of_a_run_and_not_by_their_own(tmp_path):
    time = 1.7e9 + 500 + np.random.default_rng(1).normal(size=300)
    path = table(tmp_path, time=time)
    shifted, _ = loaded(path, offset=[0, 1.7e9], memory=0)
    np.testing.assert_array_equal(shifted.inputs[np.arange(300)][:, 1], (time - 1.7e9).astype(np.float32))
    raw, warnings = loaded(path, offset=())
    assert raw.offset is None
    assert not warnings
    np.testing.assert_array_equal(raw.inputs[:, 1], time.astype(np.float32))
    np.savez(path, inputs=raw.inputs, labels=raw.labels)  # float32, which could stay in the file
    shifted, _ = loaded(path, offset=[0, 1.7e9], memory=0)
    np.testing.assert_array_equal(shifted.inputs[np.arange(300)][:, 1], raw.inputs[:, 1].astype(np.float64) - 1.7e9)


def test_the_offset_is_of_the_rows_for_training_where_a_file_has_its_own_test_rows(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "parts.npz"
    parts = {
        "train_inputs": 1.7e9 + rng.normal(size=(200, 1)),
        "train_labels": np.arange(200) % 2,
        "test_inputs": 1.7e9 + 50 + rng.normal(size=(100, 1)),
        "test_labels": np.arange(100) % 2,
    }
    np.savez(path, **parts)
    data, _ = loaded(path)
    assert data.offset.tolist() == [1.7e9]
    np.testing.assert_array_equal(data.inputs[200:], (parts["test_inputs"] - 1.7e9).astype(np.float32))


def test_a_few_values_far_away_are_refused_since_the_others_would_be_alike_once_standardized(tmp_path):
    time = 1.7e9 + np.random.default_rng(1).normal(size=300)
    time[::50] = 0  # missing
    with pytest.raises(
        InputError, match=r"column 1, 1.2\d wide at 17\d+.*, with values as far away as 0: if these mean"
    ):
        load_data(f"npz:{table(tmp_path, time=time)}")


def test_columns_that_float64_cannot_resolve_either_are_refused(tmp_path):
    path = table(
        tmp_path, nanoseconds=1_700_000_000_000_000_000.0 + 256.0 * np.random.default_rng(1).integers(0, 4, 300)
    )
    with pytest.raises(
        InputError, match=r"got column 1, .* which float64 does not resolve either: subtract a constant"
    ):
        load_data(f"npz:{path}")
    for size in (1e-50, 1e-300):  # squares of the latter are 0
        tiny = size * np.random.default_rng(1).integers(0, 2, 300)
        with pytest.raises(InputError, match=r"got column 1, .* wide: multiply that column by a constant"):
            load_data(f"npz:{table(tmp_path, tiny=tiny)}")


def test_columns_that_float32_resolves_stay_as_they_are(tmp_path):
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
    data, warnings = loaded(path)
    assert data.offset is None
    assert not warnings
    with np.load(path) as saved:
        assert data.fingerprint == fingerprint(saved["inputs"].astype(np.float32), data.labels, None)
