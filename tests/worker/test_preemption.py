from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from worker import preemption
from worker.preemption import give_way, give_way_within, letting_through


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
