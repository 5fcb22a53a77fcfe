"""Logits, run once, whatever befalls the process or the disk: kills, company, and no room."""

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
from teacher_cache_files import CHUNK, Counting, contents, filled, mend, pixels_of, read_back, right, teacher

from ev3_distill.errors import InputError
from ev3_distill.teachers.cache import append_log, output_store
from ev3_distill.teachers.cache.output_store import LogitStore, collect

# Processes and threads.

SCRIPT = """
import errno, resource, sys, time, types
sys.modules["ev3_distill.teachers"] = types.ModuleType("ev3_distill.teachers")  # no jax: many processes start
sys.modules["ev3_distill.teachers"].__path__ = ["teachers"]
from pathlib import Path
import numpy as np
from ev3_distill.teachers.cache import append_log as chunks, output_store as logits
from ev3_distill.teachers.cache.output_store import Contents, LogitStore, collect
logits.CHUNK_ROWS, chunks.POLL_S, root, K = 16, 0.02, Path(sys.argv[1]), 5
"""


def script(root, code):
    """A real process that has imported all and made ready, and waits for a line to go on."""
    known = "\n".join(map(inspect.getsource, (pixels_of, teacher, right, contents, Counting)))
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
    """A process that is killed time and again ends with the very file of one that nobody disturbed."""
    code = """
    with LogitStore(contents(3000), root=root) as store:
        def slow(inputs):
            time.sleep(0.001)
            return teacher(inputs)
        collect(slow, pixels_of, np.arange(3000), store, batch_size=8)
    """
    rng, kills, log = np.random.default_rng(0), 0, tmp_path / contents(3000).key() / "rows.log"
    for _ in range(8):
        before = log.stat().st_size if log.exists() else 0
        process = script(tmp_path, code)
        go(process)
        while kills < 4 and process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.001)
        if kills < 4:
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            if kills == 2:  # and in the middle of a write
                os.truncate(log, log.stat().st_size - 10)
        else:
            ended(process)
            break
    assert kills == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_store, "CHUNK_ROWS", 16)
        whole = filled(tmp_path / "whole", 3000, batch_size=8)
    assert log.read_bytes() == whole.read_bytes()
    assert read_back(log, 3000) == ([], 0)


def test_two_processes_at_once_share_the_work(tmp_path):
    code = """
    counted, lines = Counting(), []
    def slow(inputs):
        time.sleep(0.002)
        return counted(inputs)
    with LogitStore(contents(800), root=root) as store:
        collect(slow, pixels_of, np.arange({rows}), store, batch_size=8, waiting=lines.append)
        assert store.read(np.arange({rows}))["logits"].tobytes() == right(np.arange({rows})).tobytes()
    print(len(counted.rows), len(set(counted.rows)), len(lines))
    """
    processes = [script(tmp_path, code.format(rows=rows)) for rows in ("0, 600", "200, 800", "100, 300")]
    go(*processes)
    told = [tuple(map(int, ended(process).split())) for process in processes]
    assert sum(rows for rows, _, _ in told) == 800  # none twice
    assert max(lines for _, _, lines in told) == 1
    log = tmp_path / contents(800).key() / "rows.log"
    assert read_back(log, 800) == ([], 0)


def test_waiting_is_told_and_ends_with_the_rows_or_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(append_log, "POLL_S", 0.01)
    monkeypatch.setattr(output_store, "CHUNK_ROWS", 8)
    code = """
    with LogitStore(contents(), root=root) as store:
        def stalls(inputs):
            if inputs[0, 0] == 16:
                print("stalls", flush=True)
                sys.stdin.read()
                time.sleep(60)
            return teacher(inputs)
        collect(stalls, pixels_of, np.arange(200), store, batch_size=8)
    """
    holder = script(tmp_path, code)
    go(holder)
    assert holder.stdout.readline() == "stalls\n"
    lines, counted = [], Counting()
    with LogitStore(contents(), root=tmp_path) as store:
        collect(counted, pixels_of, range(16), store, batch_size=8, waiting=lines.append)
        assert (counted.rows, lines) == ([], [])  # what the holder has appended is there for all
        threading.Timer(0.2, holder.kill).start()
        collect(counted, pixels_of, range(32), store, batch_size=8, waiting=lines.append)
    assert counted.rows == list(range(16, 32))
    assert lines == [f"another process runs this teacher for {store.directory}: waiting for it"]
    holder.communicate()


def test_a_thread_reads_while_another_collects(tmp_path, small_chunks):
    with LogitStore(contents(2000), root=tmp_path) as store:
        collector = threading.Thread(
            target=collect, args=(teacher, pixels_of, np.arange(2000), store), kwargs={"batch_size": 8}
        )
        collector.start()
        rng, reads = np.random.default_rng(0), 0
        while collector.is_alive() or not reads:
            rows = np.setdiff1d(rng.integers(0, 2000, 50), store.missing(np.arange(2000)))
            assert store.read(rows)["logits"].tobytes() == right(rows).tobytes()
            reads += 1
        collector.join()
        assert not len(store.missing(np.arange(2000)))
        assert store.damaged == 0


def test_memory_does_not_follow_the_size_of_the_file(tmp_path):
    """128 MB are written, verified and read; the process grows by less than a quarter of that."""
    code = """
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wide = contents(32_000, fields={"logits": (1000,)})
    def outputs(inputs):
        return {"logits": np.tile(inputs, (1, 1000))}
    logits.CHUNK_ROWS = 2048
    before = peak()
    with LogitStore(wide, root=root) as store:
        collect(outputs, pixels_of, np.arange(32_000), store, batch_size=256)
    with LogitStore(wide, root=root) as store:
        rng = np.random.default_rng(0)
        for rows in (*np.arange(32_000).reshape(-1, 500), *rng.integers(0, 32_000, (50, 100))):
            assert (store.read(rows)["logits"] == rows[:, None]).all()
    print(peak() - before)
    """
    process = script(tmp_path, code)
    go(process)
    grown = float(ended(process))
    assert (tmp_path / contents(fields={"logits": (1000,)}).key() / "rows.log").stat().st_size > 128e6
    assert grown < 40, f"{grown:.0f} MB"


# The disk.


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "128k"):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(90 << 10))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_store, "CHUNK_ROWS", 64)
            with LogitStore(contents(2000), root=disk) as store:
                with pytest.raises(OSError, match="No space left on device") as caught:
                    collect(teacher, pixels_of, np.arange(2000), store, batch_size=64)
                assert caught.value.errno == errno.ENOSPC
                kept = 2000 - len(store.missing(np.arange(2000)))
                assert 64 <= kept < 2000
            log = store.directory / "rows.log"
            assert log.stat().st_size == kept // 64 * (32 + 64 * 28)
            assert read_back(log, 2000) == (list(range(kept, 2000)), 0)
            ballast.unlink()
            mend(log, list(range(kept, 2000)), 2000)
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(OSError, match="No space left on device"):
            LogitStore(contents(view="other"), root=disk)


def test_a_file_size_limit(tmp_path):
    """EFBIG in place of ENOSPC."""
    code = """
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    with LogitStore(contents(2000), root=root) as store:
        try:
            collect(teacher, pixels_of, np.arange(2000), store, batch_size=8)
        except OSError as error:
            assert error.errno == errno.EFBIG
            print(2000 - len(store.missing(np.arange(2000))))
    """
    process = script(tmp_path, code)
    go(process)
    kept = int(ended(process))
    assert kept == 10_000 // CHUNK * 16
    log = tmp_path / contents(2000).key() / "rows.log"
    assert read_back(log, 2000) == (list(range(kept, 2000)), 0)
    mend(log, list(range(kept, 2000)), 2000)


def test_no_directory_to_write(tmp_path):
    (tmp_path / "file").write_text("mine")
    says = (
        r"needs a directory that it can make and write; got .* \(Not a directory\): name another by EV3_DISTILL_CACHE"
    )
    with pytest.raises(InputError, match=says):
        LogitStore(contents(), root=tmp_path / "file" / "logits")


def test_what_another_user_cached_can_be_read(tmp_path, monkeypatch):
    with LogitStore(contents(), root=tmp_path) as store:
        collect(teacher, pixels_of, range(50), store, batch_size=50)
    genuine = os.open

    def read_only(path, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return genuine(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with LogitStore(contents(), root=tmp_path) as store:
        assert store.read([3])["logits"].tobytes() == right([3]).tobytes()
        collect(teacher, pixels_of, range(50), store, batch_size=50)
        with pytest.raises(
            InputError, match=r"a cache that can be written; got .* \(Read-only file system\): name another"
        ):
            collect(teacher, pixels_of, range(51), store, batch_size=50)
