"""What a run needs at its end is imported while it trains; what cannot be imported fails at its use, not before."""

import sys

from ev3_distill.runtime import preload


def test_modules_are_imported_in_another_thread_once(monkeypatch, tmp_path):
    (tmp_path / "needed_at_the_end.py").write_text("import threading\nthread = threading.current_thread().name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(preload, "NEEDED_LATER", ("no_such_module_here", "needed_at_the_end"))
    monkeypatch.setattr(preload, "_THREADS", [])
    preload.preload()
    preload.preload()
    (thread,) = preload._THREADS
    thread.join(30)
    assert sys.modules.pop("needed_at_the_end").thread == "imports"


def test_nothing_starts_if_all_is_there(monkeypatch):
    monkeypatch.setattr(preload, "NEEDED_LATER", ("sys", "threading"))
    monkeypatch.setattr(preload, "_THREADS", [])
    preload.preload()
    assert not preload._THREADS
