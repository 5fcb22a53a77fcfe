"""Pages are written in the background of a run, are complete at its end, and their errors are not lost."""

import json
import threading

import pytest
from report_examples import make_report, make_rows

from ev3_distill.monitor import background, report
from ev3_distill.runtime.preload import preload


@pytest.fixture
def finished_run(tmp_path):
    rows = make_rows()
    (tmp_path / "report.json").write_text(json.dumps(make_report(rows)))
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_page_is_that_of_the_report(finished_run):
    page = report.write_html(finished_run).read_bytes()
    (finished_run / "report.html").unlink()
    with background.pages():
        background.write_page(finished_run)
    assert (finished_run / "report.html").read_bytes() == page
    (finished_run / "report.html").unlink()
    background.write_page(finished_run)  # outside a block, at once
    assert (finished_run / "report.html").read_bytes() == page


def test_pages_are_written_during_the_next_training(monkeypatch, tmp_path):
    begun, may_end, written = threading.Event(), threading.Event(), []

    def write(run_dir):
        begun.set()
        assert may_end.wait(10)
        written.append(run_dir)

    monkeypatch.setattr(background.report, "write_html", write)
    with background.pages():
        background.write_page(tmp_path)
        assert not begun.wait(0.1)
        preload()
        assert begun.wait(10) and not written
        may_end.set()
    assert written == [tmp_path]


def test_error_of_a_page_is_raised_at_the_end(tmp_path):
    with pytest.raises(Exception, match=r"needs report\.json"), background.pages():
        background.write_page(tmp_path)


def test_error_of_the_work_is_raised_and_pages_are_complete(finished_run):
    with pytest.raises(KeyboardInterrupt), background.pages():
        background.write_page(finished_run)
        raise KeyboardInterrupt
    assert (finished_run / "report.html").exists()
