"""A folder holds the student that was saved in it and that its run, search or export is about, or it is refused."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

import ev3_distill
from ev3_distill import students
from ev3_distill.errors import InputError
from ev3_distill.runtime.digest import tree_digest

FLIPS = 150


@pytest.fixture
def saved(tmp_path):
    """The folder of a small student, and its leaves."""
    network = students.from_name("mlp:hidden=3", (4,), 5)
    variables = network.init(jax.random.key(0))
    students.save(tmp_path / "student", network, variables)
    return tmp_path / "student", [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]


def test_every_flipped_bit_is_refused(saved, capfd):
    """Whatever file it is in. Only white space in JSON is free. No other library prints anything."""
    folder, leaves = saved
    rng, refused = random.Random(0), 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    for _ in range(FLIPS):
        file = rng.choice(files)
        good = file.read_bytes()
        content = bytearray(good)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            loaded = students.load(folder)[1]
        except InputError:
            refused += 1
        else:
            assert file.suffix == ".json" and json.loads(content) == json.loads(good)
            for one, other in zip(jax.tree.leaves(loaded), leaves, strict=True):
                np.testing.assert_array_equal(one, other)
        file.write_bytes(good)
    assert refused >= FLIPS - 5
    assert capfd.readouterr() == ("", "")


def test_missing_and_foreign_parts_are_refused(saved, tmp_path):
    folder, _ = saved
    network = students.from_name("mlp:hidden=3", (4,), 5)
    other = tmp_path / "other"
    students.save(other, network, network.init(jax.random.key(1)))
    whole = shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(folder / "variables")
    shutil.copytree(other / "variables", folder / "variables")
    with pytest.raises(InputError, match=r"must stay as it was written; .*was changed or damaged"):
        students.load(folder)
    (folder / "digest.json").write_text("{}")
    with pytest.raises(InputError, match=r"must be complete; .*digest.json lacks"):
        students.load(folder)
    (folder / "digest.json").unlink()  # an older version wrote none: what is there is loaded
    assert tree_digest(students.load(folder)[1]) != tree_digest(students.load(whole)[1])


def test_a_changed_spec_is_refused(saved):
    """The same variables would compute something else."""
    folder, _ = saved
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec))  # only white space
    students.load(folder)
    (folder / "spec.json").write_text(json.dumps(spec | {"hidden": [3.0]}))
    with pytest.raises(InputError, match=r"holds another spec than its digest\.json says"):
        students.load(folder)


def another_of(run):
    """A student of the same network with other variables."""
    network, variables = students.load(run)
    return network, jax.tree.map(lambda leaf: leaf + 1, variables)


@pytest.fixture
def swapped(finished, tmp_path):
    """A finished run into which another run's student was copied, whole and with intact digests."""
    run = shutil.copytree(finished, tmp_path / "run")
    students.save(run / "student", *another_of(run))
    return run


def test_a_swapped_student_is_refused_wherever_it_is_used(swapped, cli, here):
    fast = ("--student", "mlp:hidden=4", "--budget", "20")
    for command in (
        ("export", swapped, "--out", "out"),
        ("export", swapped, "--format", "onnx", "--out", "out"),
        ("evaluate", swapped),
        ("evaluate", swapped, "--data", "digits"),
        ("compress", "--teacher", f"flax:{swapped}", *fast, "--out", "out"),
    ):
        answer = cli(*command)
        assert (answer.code, "what ships must be what was tested; " in answer.err) == (2, True), (command, answer.err)
    for place in (swapped, swapped / "student"):
        with pytest.raises(InputError, match=r"and .*certificate\.json is about"):
            ev3_distill.load_student(place)
    assert not (here / "out").exists()
    shutil.copytree(swapped / "student", here / "mine")
    ev3_distill.load_student("mine")  # the way out: a student without a certificate


def test_certificate_of_another_spec_is_refused(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    certificate = json.loads((run / "certificate.json").read_text())
    (run / "certificate.json").write_text(json.dumps(certificate | {"spec": "ab" * 32}))
    with pytest.raises(InputError, match="has spec "):
        students.load(run)
    del certificate["spec"]  # an older version recorded the variables alone
    (run / "certificate.json").write_text(json.dumps(certificate))
    students.load(run)


def test_report_of_another_run_is_refused(finished, tmp_path, cli):
    """Its certificate would be printed for a student that it is not about."""
    run = shutil.copytree(finished, tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    report["certificate"]["claims"][0]["lower_bound"] = 0.999
    (run / "report.json").write_text(json.dumps(report))
    for command in (("export", run, "--out", tmp_path / "out"), ("evaluate", run)):
        answer = cli(*command)
        assert (answer.code, "must say the same; those in" in answer.err) == (2, True), answer.err
    (run / "certificate.json").unlink()
    assert "needs a readable certificate.json" in cli("export", run, "--out", tmp_path / "out").err


def test_students_of_a_search_are_compared_with_the_archive(saved, tmp_path):
    network, variables = students.load(saved[0])
    folder = tmp_path / "run/sizes/02/student"
    students.save(folder, network, variables)
    students.load(folder.parent)  # not in the archive yet
    entry = {"number": 2, "digest": tree_digest(variables), "spec": dict(network.spec)}
    archive = tmp_path / "run/archive.json"
    archive.write_text(json.dumps({"entries": [{**entry, "number": 1, "digest": "ab"}, entry]}))
    students.load(folder)
    archive.write_text(json.dumps({"entries": [{**entry, "digest": "ab" * 32}]}))
    with pytest.raises(InputError, match=r"archive\.json is about abababababab"):
        students.load(folder)


def test_exported_folders_hold_the_student_of_their_metadata(finished, cli, here):
    assert cli("export", finished, "--out", "out").code == 0
    assert tree_digest(students.load("out")[1]) == tree_digest(students.load(finished)[1])
    students.save(here / "other", *another_of(finished))
    for name in ("variables", "digest.json"):
        shutil.move(here / "out" / name, here / f"{name} of the run")
        shutil.move(here / "other" / name, here / "out" / name)
    with pytest.raises(InputError, match=r"model\.json is about"):
        students.load("out")
    answer = cli("compress", "--teacher", "flax:out", "--student", "mlp:hidden=4", "--budget", "20", "--out", "second")
    assert (answer.code, "model.json is about" in answer.err) == (2, True)
    sidecar = here / "out/model.json"
    sidecar.write_text(sidecar.read_text().replace("at least 9", "at least 10"))
    assert "model.json is damaged" in cli("evaluate", "out", "--data", "digits").err
