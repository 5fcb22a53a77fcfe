"""Damage to a file of logits: every row comes back right or counts as missing."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_cache_files import CHUNK, contents, filled, mend, pixels_of, read_back, teacher

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache import append_log, output_store
from ev3_distill.teachers.cache.output_store import LogitStore, collect


def damaged_in(content, chunk, how):
    at = chunk * CHUNK
    return {
        "magic": content[:at] + b"\0" + content[at + 1 :],
        "rows": content[: at + 8] + b"\xff" + content[at + 9 :],
        "length": content[: at + 22] + b"\x01" + content[at + 23 :],
        "checksum": content[: at + 24] + bytes([content[at + 24] ^ 1]) + content[at + 25 :],
        "id": content[: at + 40] + bytes([content[at + 40] ^ 1]) + content[at + 41 :],
        "value": content[: at + CHUNK - 1] + bytes([content[at + CHUNK - 1] ^ 0x80]) + content[at + CHUNK :],
        "zeros": content[:at] + bytes(CHUNK) + content[at + CHUNK :],
        "magic within": content[: at + 99] + append_log.MAGIC + content[at + 99 + len(append_log.MAGIC) :],
        "lost": content[: at + 50] + content[at + CHUNK - 50 :],
        "doubled": content[: at + 50] + content[at:],
        "two": content[: at + 50] + b"\xff" * CHUNK + content[at + CHUNK + 50 :],
    }[how]


HOWS = ("magic", "rows", "length", "checksum", "id", "value", "zeros", "magic within", "lost", "doubled", "two")


@pytest.mark.parametrize("block", [48, append_log.BLOCK])
@pytest.mark.parametrize("how", HOWS)
def test_a_chunk_damaged_in_the_middle_is_rebuilt(how, block, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(append_log, "BLOCK", block)
    log = filled(tmp_path)
    log.write_bytes(damaged_in(log.read_bytes(), 3, how))
    missing, damaged = read_back(log)
    expected = {"doubled": [], "two": list(range(48, 80))}.get(how, list(range(48, 64)))
    assert missing == expected
    assert damaged == {"lost": 2, "doubled": 0, "magic within": 14}.get(how, len(missing))  # as the bytes tell
    mend(log, missing)


def test_mended_damage_is_told_once(tmp_path, small_chunks):
    """Though other rows are still missing."""

    def some():
        with LogitStore(contents(), root=tmp_path) as store:
            collect(teacher, pixels_of, range(112), store, batch_size=16)
        return store.directory / "rows.log"

    log = some()
    log.write_bytes(damaged_in(log.read_bytes(), 3, "value"))
    assert read_back(log) == ([*range(48, 64), *range(112, 200)], 16)
    some()
    assert read_back(log) == (list(range(112, 200)), 0)


@pytest.mark.parametrize("how", ["magic", "checksum", "value", "zeros"])
def test_a_last_chunk_damaged(how, tmp_path, small_chunks):
    log = filled(tmp_path, rows=192)
    log.write_bytes(damaged_in(log.read_bytes(), 11, how))
    missing, damaged = read_back(log, 192)
    assert missing == list(range(176, 192))
    assert damaged == (16 if how == "value" else 0)  # without a header it looks like a torn tail
    mend(log, missing, 192)
    assert log.stat().st_size == 12 * CHUNK


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 6))
def test_bit_flips_never_give_wrong_values(seed, flips, tmp_path_factory):
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("flips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_store, "CHUNK_ROWS", 16)
        log = filled(root)
    content = bytearray(log.read_bytes())
    for _ in range(flips):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    log.write_bytes(content)
    missing, _ = read_back(log)
    assert 0 <= len(missing) <= 16 * flips
    mend(log, missing)
    shutil.rmtree(root)


def test_a_tail_cut_anywhere(tmp_path, small_chunks):
    log = filled(tmp_path)
    content = log.read_bytes()
    for size in (*range(3 * CHUNK - 40, 3 * CHUNK + 60), CHUNK - 1, 31, 1, 0):
        log.write_bytes(content[:size])
        missing, damaged = read_back(log)
        assert missing == list(range(size // CHUNK * 16, 200))
        assert damaged == 0
        if size % 9 == 0:
            log.write_bytes(content[:size] + bytes(20 * CHUNK if size % 2 else 0))
            mend(log, missing)
            assert log.read_bytes() == content


def test_a_log_of_another_store_is_not_trusted(tmp_path):
    other = filled(tmp_path, view="other")
    with LogitStore(contents(), root=tmp_path) as store:
        pass
    shutil.copy(other, store.directory / "rows.log")
    assert read_back(store.directory / "rows.log")[0] == list(range(200))


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "x"), ("data", "x"), ("view", "x"), ("precision", "float16"), ("rows", 3), ("format", 0)],
)
def test_a_foreign_directory_is_refused(name, value, tmp_path):
    log = filled(tmp_path)
    path = log.parent / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    says = f"must hold logits of {name} .*; got {value}: the cache is stale or another's, delete that directory or name"
    with pytest.raises(InputError, match=says):
        LogitStore(contents(), root=tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="the cache is stale or another's"):
        LogitStore(contents(), root=tmp_path)


def test_other_fields_and_sources(tmp_path):
    filled(tmp_path, teacher_source="a", data_source="b")
    with pytest.raises(InputError, match=r"must hold logits of fields {'logits': \[6\]}; got {'logits': \[5\]}"):
        LogitStore(contents(fields={"logits": (6,)}), root=tmp_path)
    with LogitStore(contents(teacher_source="c"), root=tmp_path) as store:  # named otherwise, and the same
        assert not len(store.missing(range(200)))


def test_a_cut_while_in_use(tmp_path):
    log = filled(tmp_path)
    with LogitStore(contents(), root=tmp_path) as store:
        os.truncate(log, 1000)
        with pytest.raises(InputError, match=r"must not be cut while it is in use; .*rows.log was: start again"):
            store.read(range(200))
