"""Checkpoints restore every bit, are atomic, and never return anything that was not saved."""

import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.errors import InputError
from ev3_distill.runtime import checkpoint
from ev3_distill.runtime.checkpoint import Checkpoints
from ev3_distill.runtime.digest import tree_digest

SMALL_BYTES = 2**20  # leaves above this have an array of their own on disk


class Pair(NamedTuple):
    a: object
    b: object


def state(x=0.0, *, large=False):
    x = float(x)
    tree = {
        "pair": Pair(jnp.arange(3, dtype=jnp.uint32), (jnp.bool_(True), jnp.float32(x))),
        "empty": jnp.zeros((0, 4)),
        "half": jnp.arange(5, dtype=jnp.bfloat16),
        "odd": jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]),
        "many": [jnp.full((2, 3), x + i) for i in range(100)],
    }
    return tree | ({"large": jnp.arange(SMALL_BYTES // 4 + 1, dtype=jnp.float32) + x} if large else {})


def bits(tree):
    return [(np.asarray(leaf).dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def checkpoints(tmp_path):
    manager = Checkpoints(tmp_path)
    yield manager
    manager.close()


@pytest.mark.parametrize("large", [False, True])
def test_restore_returns_every_bit(checkpoints, large):
    saved = state(0.1, large=large)
    checkpoints.save(7, saved)
    iteration, restored, warnings = checkpoints.restore(state(large=large))
    assert (iteration, warnings) == (7, [])
    assert bits(restored) == bits(saved)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_restore_without_checkpoints_returns_none(checkpoints):
    assert checkpoints.restore(state()) is None


def test_last_three_checkpoints_are_kept_and_the_newest_is_read(checkpoints, tmp_path):
    for i in range(5):
        checkpoints.save(i, state(i))
    checkpoints.save(4, state(-1.0))  # an iteration is saved once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]
    other = Checkpoints(tmp_path)
    iteration, restored, _ = other.restore(state())
    other.close()
    assert (iteration, bits(restored)) == (4, bits(state(4)))


def test_leaves_up_to_a_mebibyte_share_one_array(checkpoints, monkeypatch):
    """Orbax's cost is per array: the 138 leaves of a default run took 80 to 200 ms one by one, and 30 ms together."""
    saved, save = [], checkpoints._manager.save
    monkeypatch.setattr(checkpoints._manager, "save", lambda i, args: saved.append(args) or save(i, args=args))
    largest = {"largest small": jnp.zeros(SMALL_BYTES // 4)}
    checkpoints.save(1, state(large=True) | largest)
    assert {leaf.shape for leaf in saved[0]["state"].item.values()} == {(SMALL_BYTES // 4 + 1,), (2443 + SMALL_BYTES,)}


def files(path):
    return sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = tmp_path_factory.mktemp("one")
    manager = Checkpoints(path)
    manager.save(2, state(2))
    manager.close()
    return [str(name) for name in files(path / "2") if name.name != "commit_success.txt"]


@pytest.mark.parametrize("how", ["truncate", "flip", "remove"])
def test_damaged_file_falls_back_to_the_checkpoint_before(how, tmp_path, names):
    """Restore returns the newest checkpoint bit by bit, or the one before with a warning, and nothing else."""
    fell_back = 0
    for i in range(len(names)):
        folder = tmp_path / str(i)
        manager = Checkpoints(folder)
        for j in (1, 2):
            manager.save(j, state(j))
        manager.close()
        path = folder / "2" / files(folder / "2")[i]
        content = path.read_bytes()
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            os.truncate(path, len(content) // 2)
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :])
        manager = Checkpoints(folder)
        result = manager.restore(state())
        assert result is not None
        iteration, restored, warnings = result
        assert bits(restored) == bits(state(iteration))
        assert iteration == 2 - len(warnings)
        if warnings:
            fell_back += 1
            assert warnings[0].startswith("checkpoint 2 is damaged, falling back to the one before (")
            assert "\n" not in warnings[0]
            assert not (folder / "2").exists()
            manager.save(2, state(2))  # the run continues as if it had never been written
            assert bits(manager.restore(state())[1]) == bits(state(2))
        manager.close()
    assert fell_back >= 2


def test_content_that_does_not_match_its_digest_is_rejected(checkpoints, tmp_path):
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    path = tmp_path / "2" / "digest" / "metadata"
    path.write_text(json.dumps({"sha256": tree_digest(state(3))}))
    iteration, _, warnings = checkpoints.restore(state())
    assert iteration == 1
    assert "does not match its digest" in warnings[0]


def test_checkpoint_of_another_structure_is_rejected(checkpoints):
    checkpoints.save(1, {"a": jnp.zeros(4), "b": jnp.zeros(2)})
    for template in (
        {"a": jnp.zeros(2), "b": jnp.zeros(4)},
        {"a": jnp.zeros(4), "c": jnp.zeros(2)},
        {"a": jnp.zeros(6)},
    ):
        with pytest.raises(InputError, match="all damaged or written by another version of ev3-distill: resume"):
            checkpoints.restore(template)


def test_digest_depends_on_paths_types_shapes_and_bytes():
    one = {"a": np.zeros((2, 3), np.float32)}
    others = (
        {"b": one["a"]},
        {"a": one["a"].view(np.int32)},
        {"a": one["a"].reshape(3, 2)},
        {"a": np.where(np.eye(2, 3) > 0, np.float32(-0.0), one["a"])},
        {"a": [one["a"]]},
    )
    assert tree_digest(one) == tree_digest({"a": jnp.zeros((2, 3))})
    assert len({tree_digest(tree) for tree in (one, *others)}) == 1 + len(others)


def test_failed_save_leaves_the_checkpoint_before(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(1, state(1))
    monkeypatch.setattr(checkpoint, "_pack", lambda tree: {"small": object()})
    with pytest.raises(Exception, match="object"):
        checkpoints.save(2, state(2))
    monkeypatch.undo()
    other = Checkpoints(tmp_path)
    assert other.restore(state())[0] == 1
    other.close()
