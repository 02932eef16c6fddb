from __future__ import annotations

import random

import pytest

from ml_backend.clicks.clock import DRIFT_S, PAUSE_S, Clock, now


class Machine:
    """A machine whose clock can be set."""

    def __init__(self) -> None:
        self.steady, self.wall = 50.0, 1_800_000_000.0
        self.clock = Clock(lambda: self.wall, lambda: self.steady)

    def after(self, seconds: float, jump: float = 0.0) -> float:
        self.steady += seconds
        self.wall += seconds + jump
        return self.clock.now()


@pytest.mark.parametrize("jump", [-3600.0, -1.0, 1.0, 86400.0])
def test_a_jump_is_taken_up_after_a_pause(jump: float) -> None:
    machine = Machine()
    before = machine.after(1)
    assert machine.after(2, jump) == pytest.approx(before + 2)
    assert machine.after(PAUSE_S / 2) == pytest.approx(before + 2 + PAUSE_S / 2)
    assert machine.after(PAUSE_S + 1) == machine.wall


def test_drift_is_followed_and_never_backwards() -> None:
    machine, dice, last = Machine(), random.Random(1), 0.0
    for _ in range(1000):
        time = machine.after(dice.uniform(0, 0.01), dice.uniform(-0.02, 0.02))
        assert time >= last
        assert abs(time - machine.wall) <= DRIFT_S
        last = time


def test_it_is_the_time_of_day() -> None:
    import time

    assert abs(now() - time.time()) < DRIFT_S + 1
