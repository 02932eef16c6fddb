"""The time of day for the click log, which does not jump in the middle of an object.

Clicks are put in order by their times. When the machine's clock is set, by hand or by its first contact with a time
server, clicks under way keep the old time, and the new one is taken up when nobody has clicked for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: A difference up to this is drift, seconds: it is followed, but never backwards. More is a jump.
DRIFT_S = 0.5
#: A jump is taken up after a pause of this length, seconds: longer than anybody thinks about one object.
PAUSE_S = 600.0


class Clock:
    """Seconds since the epoch. Between two calls less than `PAUSE_S` apart it never goes back and never leaps."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._lock = threading.Lock()
        self._last, self._at = wall(), steady()

    def now(self) -> float:
        """The time of day, seconds since the epoch."""
        with self._lock:
            at, told = self._steady(), self._wall()
            passed = at - self._at
            expected = self._last + passed
            if passed > PAUSE_S:
                now = told
            elif abs(told - expected) <= DRIFT_S:
                now = max(told, self._last)
            else:
                now = expected
            self._last, self._at = now, at
            return now


now = Clock().now
