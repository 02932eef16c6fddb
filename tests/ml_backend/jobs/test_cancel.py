from __future__ import annotations

import threading
import time

import pytest

from ml_backend.jobs.cancel import Cancellable


class StopIt(Exception):
    pass


def test_a_block_is_ended_from_another_thread() -> None:
    block = Cancellable(StopIt)
    timer = threading.Timer(0.05, block.cancel)
    with pytest.raises(StopIt), block:
        timer.start()
        while True:
            time.sleep(0.001)


def test_before_and_after_it_nothing_happens() -> None:
    block = Cancellable(StopIt)
    block.cancel()
    with block:
        pass
    block.cancel()
    time.sleep(0.01)


def test_what_is_done_meanwhile_is_not_ended_but_the_block_is_after_it() -> None:
    block, done = Cancellable(StopIt), []
    with pytest.raises(StopIt), block:
        with block.set_aside():
            thread = threading.Thread(target=block.cancel)
            thread.start()
            thread.join()
            for _ in range(10):
                time.sleep(0.001)
            done.append(1)
        done.append(2)
    assert done == [1]
    with Cancellable(StopIt) as other, other.set_aside():
        done.append(3)
    assert done == [1, 3]


def test_what_comes_at_the_very_end_does_not_leak_out() -> None:
    """Cancelled as often as possible at the moment of leaving: raised inside of the block, or not at all."""
    ended = 0
    for _ in range(300):
        block = Cancellable(StopIt)
        thread = threading.Thread(target=block.cancel)
        try:
            with block:
                thread.start()
        except StopIt:
            ended += 1
        thread.join()
        for _ in range(100):  # whatever were left would be raised here, outside
            time.monotonic()
    assert 0 <= ended <= 300
