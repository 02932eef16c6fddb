from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from worker import preemption
from worker.contract import NotQuickError
from worker.preemption import (
    before_long_work,
    give_way,
    give_way_within,
    letting_through,
    stand_by,
    until_computed,
)


@pytest.fixture(autouse=True)
def ask_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "ASK_EVERY_S", -1.0)


def test_only_inside_and_not_within_what_goes_first() -> None:
    calls = []

    def urgent() -> None:
        calls.append(1)
        give_way()

    give_way()
    assert calls == []
    with letting_through(urgent):
        give_way()
        give_way()
        other = threading.Thread(target=give_way)
        other.start()
        other.join()
    give_way()
    assert calls == [1, 1]


def test_what_goes_first_may_have_to_be_quick() -> None:
    found = []

    def outer() -> None:
        before_long_work()  # within a batch anything goes
        with letting_through(inner, quick=True):
            give_way()
            before_long_work()
        found.append("outer")

    def inner() -> None:
        found.append("inner")
        with pytest.raises(NotQuickError):
            before_long_work()

    before_long_work()
    with letting_through(outer):
        give_way()
        before_long_work()
    assert found == ["inner", "outer"]


def test_what_works_beside_stands_by_until_the_outermost_is_done() -> None:
    free = []

    def inside() -> None:
        with letting_through(lambda: None, quick=True):
            give_way()
        free.append(preemption._free.is_set())

    with letting_through(inside):
        give_way()
    assert free == [False]
    assert preemption._free.is_set()


def test_a_fault_of_what_goes_first_changes_nothing_afterwards() -> None:
    calls = []

    def urgent() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError

    with letting_through(urgent):
        with pytest.raises(RuntimeError):
            give_way()
        give_way()
    assert len(calls) == 2


def test_before_each_layer() -> None:
    encoder = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    give_way_within(encoder)
    give_way_within(encoder)
    calls = []
    with letting_through(lambda: calls.append(1)):
        encoder(torch.zeros(1, 2))
    assert len(calls) == 4


def test_what_goes_first_runs_in_float32_and_keeps_no_inference_tensors() -> None:
    """A click in the middle of an encoder's 16 bits is answered as any other."""
    found = []

    def urgent() -> None:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        found.append((product.dtype, product.is_inference(), torch.is_grad_enabled()))

    with letting_through(urgent), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        give_way()
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert found == [(torch.float32, False, False)]


def test_on_a_gpu_clicks_go_before_the_layers_that_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is stood in for: an image that takes three looks, and a stream that is only noted."""
    looks: list[int] = []
    entered: list[str] = []

    class Event:
        def record(self) -> None:
            looks.append(0)

        def query(self) -> bool:
            looks[0] += 1
            return looks[0] > 3

    @contextmanager
    def stream(name: str) -> Iterator[None]:
        entered.append(name)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(preemption, "_urgent_stream", lambda device: f"urgent on {device}")
    monkeypatch.setattr(preemption, "_device", torch.device("cuda:1"))
    with letting_through(lambda: entered.append("click")):
        until_computed(torch.device("cuda:1"))
    assert entered == ["urgent on cuda:1", "click", "left"] * 3
    looks.clear()
    until_computed(torch.device("cpu"))
    assert looks == []


def test_threads_beside_the_model_have_one_thread_and_a_low_priority() -> None:
    found = []

    def beside() -> None:
        preemption.work_beside()
        found.append((torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert found[0][0] == 1
    if sys.platform == "linux":
        assert found[0][1] == min(before + preemption.BESIDE_NICENESS, 19)
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_what_works_beside_stands_by_while_something_goes_first() -> None:
    done = threading.Event()
    seen = []

    def work() -> None:
        preemption.work_beside()
        stand_by()
        done.set()

    beside = threading.Thread(target=work)

    def urgent() -> None:
        beside.start()
        seen.append(done.wait(0.2))

    stand_by()
    with letting_through(urgent):
        give_way()
    beside.join(5)
    assert seen == [False]
    assert done.is_set()
