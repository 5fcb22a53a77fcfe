"""Provenance of rows: command, machine, versions, and one code hash for a checkout and for a wheel."""

import shutil
from pathlib import Path

from ev3_distill.benchmarks.provenance import code_hash, provenance


def test_provenance_has_the_machine_but_not_its_host_name():
    header = provenance("throughput", seeds=10, size="full")
    assert header["command"] == "ev3-distill bench throughput --seeds 10"
    assert set(header["machine"]) == {"cpu", "cores", "accelerator"}
    assert set(header["versions"]) == {"python", "jax", "flax", "optax", "numpy"}


def package(place: Path) -> Path:
    """A package with a room that lies beside it and is reached by a link."""
    (place / "room").mkdir(parents=True)
    (place / "package").mkdir()
    (place / "package" / "core.py").write_text("x = 1\n")
    (place / "room" / "bench.py").write_text("y = 1\n")
    (place / "package" / "room").symlink_to("../room", target_is_directory=True)
    return place / "package"


def test_code_hash_follows_every_module_and_ignores_the_layout(tmp_path):
    linked = package(tmp_path / "checkout")
    first = code_hash(linked)
    installed = tmp_path / "site-packages"
    shutil.copytree(linked, installed)  # follows the link, as a wheel does
    assert not (installed / "room").is_symlink() and code_hash(installed) == first
    (linked / "notes.txt").write_text("no code")
    assert code_hash(linked) == first
    for name in ("core.py", "room/bench.py"):
        before = code_hash(linked)
        with (linked / name).open("a") as file:
            file.write("z = 2\n")
        assert code_hash(linked) != before
