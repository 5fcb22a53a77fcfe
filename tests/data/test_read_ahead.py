"""Windows of the input pipeline are read ahead by one thread, in order."""

import threading

import pytest

from ev3_distill.data.pipeline import _read_ahead


class Reads:
    """Window number -> itself; records which thread read it, and may fail."""

    def __init__(self, fails_at=None):
        self.threads, self.fails_at, self.second_was_read = {}, fails_at, threading.Event()

    def __len__(self):
        return 100

    def __getitem__(self, number):
        self.threads[number] = threading.current_thread()
        if number == self.fails_at:
            raise OSError("the disk is gone")
        if number == 4:
            self.second_was_read.set()
        return number


def test_the_next_window_is_read_by_another_thread_while_this_one_is_used():
    reads = Reads()
    windows = _read_ahead(reads, 3)
    assert next(windows) == 3
    assert reads.second_was_read.wait(10)  # before it is asked for
    assert [next(windows) for _ in range(5)] == [4, 5, 6, 7, 8]
    assert len({*reads.threads.values()}) == 1
    assert threading.current_thread() not in reads.threads.values()


def test_at_most_one_window_is_read_ahead():
    reads = Reads()
    windows = _read_ahead(reads, 0)
    next(windows)
    windows.close()
    assert set(reads.threads) <= {0, 1}


def test_an_error_of_the_reader_reaches_the_caller():
    windows = _read_ahead(Reads(fails_at=1), 0)
    assert next(windows) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(windows)


def test_the_thread_ends_with_the_iterator():
    reads = Reads()
    windows = _read_ahead(reads, 0)
    next(windows)
    windows.close()
    reads.threads[0].join(10)
    assert not reads.threads[0].is_alive()
