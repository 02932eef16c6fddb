"""How long work lets short work through: it asks, between two small steps, whether somebody is waiting.

There is one model in a process and one thread that runs it. A click must not wait until an image of a batch is encoded,
so whoever runs a batch job says what to do about clicks (`letting_through`), and the batch job calls `give_way` between
two layers of the encoder and between two objects. The click is answered there and then, on the same thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from torch import nn

#: Asking may cost a request to Redis: not more often than this, seconds.
ASK_EVERY_S = 0.005

_local = threading.local()
_watched: WeakSet[nn.Module] = WeakSet()
_watched_lock = threading.Lock()


@contextmanager
def letting_through(answer_waiting: Callable[[], None]) -> Iterator[None]:
    """In this block, on this thread, `give_way` calls `answer_waiting`, which does what is more urgent, if anything."""
    outer = getattr(_local, "answer", None)
    _local.answer, _local.asked = answer_waiting, 0.0
    try:
        yield
    finally:
        _local.answer = outer


def give_way() -> None:
    """Let what is more urgent go first. Does nothing outside of `letting_through`, and inside of what goes first."""
    answer = getattr(_local, "answer", None)
    if answer is None or time.monotonic() - _local.asked < ASK_EVERY_S:
        return
    _local.answer = None
    try:
        answer()
    finally:
        _local.answer, _local.asked = answer, time.monotonic()


def give_way_within(encoder: nn.Module) -> None:
    """Make `encoder` call `give_way` before each of its layers: the members of its lists and sequences of modules."""
    from torch import nn

    with _watched_lock:
        if encoder in _watched:
            return
        _watched.add(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for layer in module:
                layer.register_forward_pre_hook(_before_layer)


def _before_layer(_layer: nn.Module, _inputs: Any) -> None:
    give_way()
