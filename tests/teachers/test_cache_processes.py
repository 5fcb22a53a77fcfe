"""The cache of teacher outputs under kills, concurrent processes and full disks."""

import errno
import inspect
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import small_disk
from teacher_cache_files import (
    SHARD_BYTES,
    CountingTeacher,
    assert_repaired,
    contents,
    expected_logits,
    inputs_of,
    read_back,
    shards_in,
    teacher,
)

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache import output_store, shards
from ev3_distill.teachers.cache.output_store import OutputStore, collect

# Processes and threads.

SCRIPT = """
import errno, resource, sys, time, types
sys.modules["ev3_distill.teachers"] = types.ModuleType("ev3_distill.teachers")  # no jax: many processes start
sys.modules["ev3_distill.teachers"].__path__ = ["teachers"]
from pathlib import Path
import numpy as np
from ev3_distill.teachers.cache import output_store, shards
from ev3_distill.teachers.cache.output_store import Contents, OutputStore, collect
output_store.SHARD_ROWS, shards.POLL_S, root, K = 16, 0.02, Path(sys.argv[1]), 5
"""


def script(root, code):
    """Starts a process that has imported everything and waits for a line to continue."""
    known = "\n".join(map(inspect.getsource, (inputs_of, teacher, expected_logits, contents, CountingTeacher)))
    text = "\n".join((SCRIPT, known, "print('ready', flush=True); sys.stdin.readline()", textwrap.dedent(code)))
    process = subprocess.Popen(
        [sys.executable, "-c", text, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def go(*processes):
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def ended(process, code=0):
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    return out


def test_kills_at_any_moment(tmp_path):
    """After repeated kills all rows are right, each was stored once, and no partial file is left."""
    code = """
    with OutputStore(contents(3000), root=root) as store:
        def slow(inputs):
            time.sleep(0.001)
            return teacher(inputs)
        collect(slow, inputs_of, np.arange(3000), store, batch_size=8)
    """
    rng, kills, directory = np.random.default_rng(0), 0, tmp_path / contents(3000).key()
    for _ in range(8):
        before = len(list(directory.glob("*.rows")))
        process = script(tmp_path, code)
        go(process)
        while kills < 4 and process.poll() is None and len(list(directory.glob("*.rows"))) <= before:
            time.sleep(0.001)
        if kills < 4:
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            if kills == 2:  # as a kill in the middle of a write leaves it
                (directory / ".half.rows.1.tmp").write_bytes(b"half")
        else:
            ended(process)
            break
    assert kills == 4
    assert read_back(directory, 3000) == ([], 0)
    rows = [np.frombuffer(path.read_bytes()[shards.HEADER.size :], "<i8", 1) for path in directory.glob("*.rows")]
    assert len(np.unique(rows)) == len(rows)
    assert sum((path.stat().st_size - shards.HEADER.size) // 28 for path in directory.glob("*.rows")) == 3000
    assert not list(directory.glob(".*"))


def test_two_processes_at_once_share_the_work(tmp_path):
    code = """
    counted, lines = CountingTeacher(), []
    def slow(inputs):
        time.sleep(0.002)
        return counted(inputs)
    with OutputStore(contents(800), root=root) as store:
        collect(slow, inputs_of, np.arange({rows}), store, batch_size=8, on_wait=lines.append)
        assert store.read(np.arange({rows}))["logits"].tobytes() == expected_logits(np.arange({rows})).tobytes()
    print(len(counted.rows), len(set(counted.rows)), len(lines))
    """
    processes = [script(tmp_path, code.format(rows=rows)) for rows in ("0, 600", "200, 800", "100, 300")]
    go(*processes)
    results = [tuple(map(int, ended(process).split())) for process in processes]
    assert sum(rows for rows, _, _ in results) == 800  # each row once
    assert max(lines for _, _, lines in results) == 1
    assert read_back(tmp_path / contents(800).key(), 800) == ([], 0)


def test_a_waiting_process_continues_when_its_rows_appear_or_the_writer_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "POLL_S", 0.01)
    monkeypatch.setattr(output_store, "SHARD_ROWS", 8)
    code = """
    with OutputStore(contents(), root=root) as store:
        def stalls(inputs):
            if inputs[0, 0] == 16:
                print("stalls", flush=True)
                sys.stdin.read()
                time.sleep(60)
            return teacher(inputs)
        collect(stalls, inputs_of, np.arange(200), store, batch_size=8)
    """
    holder = script(tmp_path, code)
    go(holder)
    assert holder.stdout.readline() == "stalls\n"
    lines, counted = [], CountingTeacher()
    with OutputStore(contents(), root=tmp_path) as store:
        collect(counted, inputs_of, range(16), store, batch_size=8, on_wait=lines.append)
        assert (counted.rows, lines) == ([], [])  # the holder has stored these rows
        threading.Timer(0.2, holder.kill).start()
        collect(counted, inputs_of, range(32), store, batch_size=8, on_wait=lines.append)
    assert counted.rows == list(range(16, 32))
    assert lines == [f"another process runs this teacher for {store.directory}: waiting for it"]
    holder.communicate()


def test_a_thread_reads_while_another_collects(tmp_path, small_shards):
    with OutputStore(contents(2000), root=tmp_path) as store:
        collector = threading.Thread(
            target=collect, args=(teacher, inputs_of, np.arange(2000), store), kwargs={"batch_size": 8}
        )
        collector.start()
        rng, reads = np.random.default_rng(0), 0
        while collector.is_alive() or not reads:
            rows = np.setdiff1d(rng.integers(0, 2000, 50), store.missing(np.arange(2000)))
            assert store.read(rows)["logits"].tobytes() == expected_logits(rows).tobytes()
            reads += 1
        collector.join()
        assert not len(store.missing(np.arange(2000)))
        assert store.damaged == 0


def test_memory_does_not_grow_with_the_store(tmp_path):
    """The process writes, verifies and reads 128 MB, and grows by less than a third of that."""
    code = """
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wide = contents(32_000, fields={"logits": (1000,)})
    def outputs(inputs):
        return {"logits": np.tile(inputs, (1, 1000))}
    output_store.SHARD_ROWS = 2048
    before = peak()
    with OutputStore(wide, root=root) as store:
        collect(outputs, inputs_of, np.arange(32_000), store, batch_size=256)
    with OutputStore(wide, root=root) as store:
        rng = np.random.default_rng(0)
        for rows in (*np.arange(32_000).reshape(-1, 500), *rng.integers(0, 32_000, (50, 100))):
            assert (store.read(rows)["logits"] == rows[:, None]).all()
    print(peak() - before)
    """
    process = script(tmp_path, code)
    go(process)
    grown = float(ended(process))
    directory = tmp_path / contents(fields={"logits": (1000,)}).key()
    assert sum(path.stat().st_size for path in directory.glob("*.rows")) > 128e6
    assert grown < 40, f"{grown:.0f} MB"


# The disk.


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "128k"):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(90 << 10))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_store, "SHARD_ROWS", 128)
            with OutputStore(contents(2000), root=disk) as store:
                with pytest.raises(OSError, match="No space left on device") as caught:
                    collect(teacher, inputs_of, np.arange(2000), store, batch_size=128)
                assert caught.value.errno == errno.ENOSPC
                kept = 2000 - len(store.missing(np.arange(2000)))
                assert 128 <= kept < 2000
            assert {path.stat().st_size for path in shards_in(store.directory)} == {shards.HEADER.size + 128 * 28}
            assert not list(store.directory.glob(".*"))
            assert read_back(store.directory, 2000) == (list(range(kept, 2000)), 0)
            ballast.unlink()
            assert_repaired(store.directory, list(range(kept, 2000)), 2000)
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(OSError, match="No space left on device"):
            OutputStore(contents(view="other"), root=disk)


def test_a_file_size_limit(tmp_path):
    """EFBIG instead of ENOSPC."""
    code = """
    with OutputStore(contents(2000), root=root) as store:
        collect(teacher, inputs_of, np.arange(160), store, batch_size=16)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        try:
            collect(teacher, inputs_of, np.arange(2000), store, batch_size=16)
        except OSError as error:
            assert error.errno == errno.EFBIG
            print(2000 - len(store.missing(np.arange(2000))))
    """
    process = script(tmp_path, code)
    go(process)
    kept = int(ended(process))
    assert (kept, SHARD_BYTES > 400) == (160, True)
    directory = tmp_path / contents(2000).key()
    assert not list(directory.glob(".*"))
    assert read_back(directory, 2000) == (list(range(kept, 2000)), 0)
    assert_repaired(directory, list(range(kept, 2000)), 2000)


def test_a_root_that_is_not_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    message = (
        r"needs a directory that it can create and write; got .* \(Not a directory\): name another in EV3_DISTILL_CACHE"
    )
    with pytest.raises(InputError, match=message):
        OutputStore(contents(), root=tmp_path / "file" / "logits")


def test_a_read_only_cache_can_be_read(tmp_path, monkeypatch):
    with OutputStore(contents(), root=tmp_path) as store:
        collect(teacher, inputs_of, range(50), store, batch_size=50)
    genuine = os.open

    def read_only(path, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return genuine(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with OutputStore(contents(), root=tmp_path) as store:
        assert store.read([3])["logits"].tobytes() == expected_logits([3]).tobytes()
        collect(teacher, inputs_of, range(50), store, batch_size=50)
        with pytest.raises(
            InputError, match=r"a cache that is writable; got .* \(Read-only file system\): name another"
        ):
            collect(teacher, inputs_of, range(51), store, batch_size=50)
