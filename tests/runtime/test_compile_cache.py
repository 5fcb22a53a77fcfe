"""Stored programs: what is stored is read back or compiled again, whatever happens to the files and to the processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL, newest_digest, rows_without_times, variables_of
from processes import QUICK_COMPILE

from ev3_distill.runtime import compile_cache

VALUE = bytes(range(256)) * 5


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache" / compile_cache.FOLDER


@pytest.fixture
def store(root):
    directory = root / "version"
    directory.mkdir(parents=True)
    return compile_cache.Store(directory)


def environment(tmp_path, **more):
    """Of a user who has set nothing."""
    ours = ("XLA_FLAGS", "EV3_DISTILL_KERNELS", *(name for name in os.environ if name.startswith("JAX_")))
    rest = {name: value for name, value in os.environ.items() if name not in ours}
    rest |= {"EV3_DISTILL_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": QUICK_COMPILE}
    return rest | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | more


def python(code, tmp_path, *argv, **more):
    """Runs code in a process in which warnings are errors; returns what it prints."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, argv)]
    done = subprocess.run(command, env=environment(tmp_path, **more), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# The store.


def test_a_value_is_read_back_and_may_be_replaced(store):
    key = "jit_" + 300 * "f" + "-0123"
    assert store.get(key) is None
    store.put(key, b"first")
    store.put(key, VALUE)
    assert store.get(key) == VALUE
    assert (store.reads, store.hits) == (2, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:32],
        lambda content: content[:-1],
        lambda content: content[:500] + b"\0" + content[501:],
        lambda content: bytes(len(content)),
        lambda content: content + b"\0",
    ],
)
def test_a_damaged_file_is_a_miss_and_is_deleted(store, root, damage):
    store.put("key", VALUE)
    path = root / "version" / "key"
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("key") is None and not path.exists()
    store.put("key", VALUE)
    assert store.get("key") == VALUE


def test_a_directory_that_is_gone_or_full_of_surprises_is_a_miss(store, root):
    (root / "version" / "key").mkdir()
    store.put("key", VALUE)
    assert store.get("key") is None
    (root / "version" / "key").rmdir()
    (root / "version").rmdir()
    store.put("key", VALUE)
    assert store.get("key") is None


def test_what_was_not_used_for_longest_is_deleted_first(store, root):
    for age, key in enumerate("edcba"):
        store.put(key, VALUE)
        os.utime(root / "version" / key, (1000 - age, 1000 - age))
    size = (root / "version" / "a").stat().st_size
    assert store.get("a") == VALUE  # used now
    for name, age in (("old.tmp", 2 * compile_cache.STALE_S), ("new.tmp", 0)):
        (root / "version" / f".{name}").touch()
        os.utime(root / "version" / f".{name}", (time.time() - age,) * 2)
    compile_cache.trim(root, limit=3 * size)
    assert {path.name for path in (root / "version").iterdir()} == {"a", "d", "e", ".new.tmp"}
    compile_cache.trim(root / "missing")


def test_only_a_private_directory_is_used(root, monkeypatch):
    private = compile_cache.make_private
    assert private(root) == "" and root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o750)
    assert "other users have access to" in private(root)
    root.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
        assert "belongs to another user" in private(root)
    moved = root.rename(root.with_name("moved"))
    root.symlink_to(moved)
    assert "is a link" in private(root)
    root.unlink()
    root.touch()
    assert "File exists" in private(root)


def test_other_flags_and_other_processors_have_programs_of_their_own(monkeypatch):
    names = []
    for flags, number in (("", 2), ("--xla_one", 2), ("", 3)):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setattr(compile_cache, "cores", lambda number=number: number)
        compile_cache.version.cache_clear()
        names.append(compile_cache.version())
    compile_cache.version.cache_clear()
    assert len(set(names)) == 3


# Processes.

PROGRAMS = """
import json, warnings, jax, jax.numpy as jnp
from ev3_distill.runtime import compile_cache
reason = compile_cache.start()
warnings.simplefilter("error", append=True)
values = [float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.arange(6.0).reshape(2, 3)).sum()),
          float(jax.jit(lambda x: jax.pure_callback(lambda x: 2 * x, x, x) + 1)(jnp.float32(3)))]
print(json.dumps({"values": values, "reason": reason, **compile_cache.usage()}))
"""


def test_a_second_process_compiles_nothing_and_damaged_files_are_replaced(tmp_path, root):
    first, second = python(PROGRAMS, tmp_path), python(PROGRAMS, tmp_path)
    assert first["from_cache"] == 0 < second["from_cache"]
    assert second["programs"] - second["from_cache"] == 1  # the callback is part of its process
    (directory,) = root.iterdir()
    for number, path in enumerate(directory.iterdir()):
        if number % 2:
            path.write_bytes(path.read_bytes()[:100])
        else:
            compile_cache.Store(directory).put(path.name, b"no program, with the right digest")
    third, fourth = python(PROGRAMS, tmp_path), python(PROGRAMS, tmp_path)
    assert fourth["from_cache"] == second["from_cache"]
    assert first["values"] == second["values"] == third["values"] == fourth["values"]


@pytest.mark.slow
def test_a_directory_of_the_user_is_left_alone(tmp_path, root):
    own = python(PROGRAMS, tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert "programs" not in own and not root.exists()
    root.parent.mkdir()
    root.symlink_to(tmp_path)
    linked = python(PROGRAMS, tmp_path)
    assert "programs" not in linked and linked["reason"] == f"{root} is a link"


CONVOLUTION = """
import json, sys, warnings, jax, jax.numpy as jnp
from ev3_distill.runtime import compile_cache
from ev3_distill.students.layers import compiled, conv
if sys.argv[1] == "ours":
    compile_cache.start()
warnings.simplefilter("error")
def gradient(w):
    return jax.grad(lambda w: conv.convolve(jnp.ones((2, 4, 4, 8)), w).sum())(w)
def kernel():
    return jnp.full((3, 3, 8, 8), 0.5)
loss, kernel = jax.jit(gradient), jax.jit(kernel)()
print(json.dumps({"available": compiled.available(), "value": float(loss(kernel).sum()), **compile_cache.usage()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "of the user"])
def test_programs_with_compiled_kernels_are_stored(tmp_path, root, whose):
    own = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if whose != "ours":
        own["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    first, second = (python(CONVOLUTION, tmp_path, whose, **own) for _ in range(2))
    if not first["available"]:
        pytest.skip("the kernels do not work here")
    assert second["available"] and first["value"] == second["value"]
    folder = next(root.iterdir()) if whose == "ours" else tmp_path / "own"
    assert {"jit_kernel", "jit_gradient"} <= {path.name.partition("-")[0] for path in folder.iterdir()}
    if whose == "ours":
        assert second["programs"] == second["from_cache"]


WRITER = """
import hashlib, sys
from pathlib import Path
from ev3_distill.runtime import compile_cache
store = compile_cache.Store(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(10**9):
    key = f"{number % 3}-{number % 5}"
    store.put(key, hashlib.sha256(key.encode()).digest() * 100_000)
    store.get(key)
    compile_cache.trim(Path(sys.argv[1]).parent, 20_000_000)
"""


def test_processes_that_write_the_same_files_are_killed(tmp_path, store, root):
    import hashlib

    command = [sys.executable, "-c", WRITER, str(root / "version")]
    processes = [
        subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    found = 0
    for _ in range(40):
        for key in ("0-0", "1-1", "2-2", "0-3"):
            value = store.get(key)
            assert value in (None, hashlib.sha256(key.encode()).digest() * 100_000)
            found += value is not None
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for path in (root / "version").glob("[0-9]*"):
        assert store.get(path.name) == hashlib.sha256(path.name.encode()).digest() * 100_000
        found += 1
    assert found


# Commands.


def command(tmp_path, *argv):
    return subprocess.Popen(
        [sys.executable, "-m", "ev3_distill", *argv],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "warning" not in output.lower()


@pytest.mark.slow
def test_all_ways_to_compile_give_the_same_student(tmp_path, root):
    """Two cold runs at once, a warm one, one with damaged files, one without the cache, and one that is killed and resumed."""
    options = ("compress", *SMALL)
    for process in [command(tmp_path, *options, "--out", name) for name in ("cold", "cold too")]:
        finish(process)
    finish(command(tmp_path, *options, "--out", "warm"))
    size = sum(path.stat().st_size for path in root.glob("*/*"))
    finish(command(tmp_path, *options, "--out", "without", "--no-compile-cache"))
    assert sum(path.stat().st_size for path in root.glob("*/*")) == size
    for number, path in enumerate(sorted(root.glob("*/*"))):
        if number % 2:
            path.write_bytes(path.read_bytes()[: 1000 * (number % 3)])
    killed = command(tmp_path, *options, "--out", "killed")
    ledger = tmp_path / "killed" / "ledger.jsonl"
    while not ledger.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "killed" / "report.json").exists()
    finish(command(tmp_path, "compress", "--resume", "killed"))

    def results(name):
        run = tmp_path / name
        return rows_without_times(run / "ledger.jsonl"), variables_of(run), variables_of(run / "teacher")

    for name in ("cold too", "warm", "without", "killed"):
        assert results(name) == results("cold")
    assert newest_digest(tmp_path / "warm") == newest_digest(tmp_path / "cold")
    cost = {name: json.loads((tmp_path / name / "report.json").read_text())["cost"] for name in ("warm", "without")}
    assert "programs" not in cost["without"]
    assert cost["warm"]["programs"] - cost["warm"]["from_cache"] <= 3  # some follow the speed of the machine
    assert (
        f"{cost['warm']['from_cache']} of {cost['warm']['programs']}"
        in (Path(tmp_path) / "warm/report.html").read_text()
    )
