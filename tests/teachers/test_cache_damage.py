"""Damaged shards of a store: each row is right or counts as missing."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_cache_files import (
    SHARD_BYTES,
    assert_repaired,
    contents,
    filled_store,
    inputs_of,
    read_back,
    shards_in,
    teacher,
)

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache import output_store
from ev3_distill.teachers.cache.output_store import OutputStore, collect
from ev3_distill.teachers.cache.shards import HEADER


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "magic": lambda content: flipped(content, 0),
    "count": lambda content: flipped(content, 8),
    "huge count": lambda content: content[:8] + b"\xff" * 8 + content[16:],
    "checksum": lambda content: flipped(content, 16),
    "id": lambda content: flipped(content, HEADER.size),
    "value": lambda content: flipped(content, len(content) - 1),
    "zeros": lambda content: bytes(len(content)),
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "header only": lambda content: content[: HEADER.size],
}
ROWS_BY_SIZE = {"empty": 0, "header only": 0, "cut": 15}  # damaged rows that the size of the file still tells


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("shard", [3, 12])
def test_rows_of_a_damaged_shard_are_computed_again(damage, shard, tmp_path, small_shards):
    directory = filled_store(tmp_path)
    path = shards_in(directory)[shard]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    missing, damaged = read_back(directory)
    assert missing == list(range(16 * shard, min(16 * shard + 16, 200)))
    assert damaged == ROWS_BY_SIZE.get(damage, len(missing)) - (shard == 12 and damage == "cut") * 8
    assert_repaired(directory, missing)
    assert not path.exists()


def test_repaired_damage_is_reported_once(tmp_path, small_shards):
    """Even if other rows are still missing."""

    def fill_some():
        with OutputStore(contents(), root=tmp_path) as store:
            collect(teacher, inputs_of, range(112), store, batch_size=16)
        return store.directory

    directory = fill_some()
    path = shards_in(directory)[3]
    path.write_bytes(DAMAGE["value"](path.read_bytes()))
    assert read_back(directory) == ([*range(48, 64), *range(112, 200)], 16)
    fill_some()
    assert read_back(directory) == (list(range(112, 200)), 0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 6))
def test_bit_flips_never_give_wrong_values(seed, flips, tmp_path_factory):
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("flips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_store, "SHARD_ROWS", 16)
        directory = filled_store(root)
    shards = shards_in(directory)
    for _ in range(flips):
        path = shards[rng.integers(len(shards))]
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    missing, _ = read_back(directory)
    assert 0 <= len(missing) <= 16 * flips
    assert_repaired(directory, missing)
    shutil.rmtree(root)


def test_lost_and_foreign_shards(tmp_path, small_shards):
    directory, other = filled_store(tmp_path), filled_store(tmp_path, view="other")
    shards = shards_in(directory)
    assert [path.stat().st_size for path in shards[:-1]] == [SHARD_BYTES] * 12
    shards[2].unlink()
    shutil.copy(shards_in(other)[2], directory)
    assert read_back(directory) == (list(range(32, 48)), 16)
    assert_repaired(directory, list(range(32, 48)))


def test_temporary_files_of_killed_writers_are_deleted(tmp_path):
    directory = filled_store(tmp_path, rows=200)
    shards_in(directory)[0].unlink()
    (directory / ".0123.rows.77.tmp").write_bytes(b"half")
    assert_repaired(directory, list(range(200)))
    assert sorted(path.suffix for path in directory.iterdir()) == ["", ".json", ".rows"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "x"), ("data", "x"), ("view", "x"), ("precision", "float16"), ("rows", 3), ("format", 0)],
)
def test_a_directory_of_another_store_is_refused(name, value, tmp_path):
    path = filled_store(tmp_path) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    message = f"must hold outputs with {name} .*; got {value}: the cache is stale or was changed, delete that directory"
    with pytest.raises(InputError, match=message):
        OutputStore(contents(), root=tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="the cache is stale or was changed"):
        OutputStore(contents(), root=tmp_path)


def test_other_fields_are_refused_and_other_sources_accepted(tmp_path):
    filled_store(tmp_path, teacher_source="a", data_source="b")
    with pytest.raises(InputError, match=r"must hold outputs with fields {'logits': \[6\]}; got {'logits': \[5\]}"):
        OutputStore(contents(fields={"logits": (6,)}), root=tmp_path)
    with OutputStore(contents(teacher_source="c"), root=tmp_path) as store:
        assert not len(store.missing(range(200)))


def test_a_change_while_in_use_is_reported(tmp_path):
    (path,) = shards_in(filled_store(tmp_path))
    with OutputStore(contents(), root=tmp_path) as store:
        os.truncate(path, 1000)
        with pytest.raises(InputError, match=r"must not change while it is in use; .*\.rows did .*: start again"):
            store.read(range(200))
        path.unlink()
        with pytest.raises(InputError, match="FileNotFoundError"):
            store.read(range(200))
