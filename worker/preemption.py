"""How long work lets short work through: it asks, between two small steps, whether somebody is waiting.

There is one model in a process and one thread that runs it. A click must not wait until an image of a batch is encoded,
so whoever runs a batch job says what to do about clicks (`letting_through`), and the batch job calls `give_way` between
two layers of the encoder, and while it waits. The click is answered there and then, on the same thread; other threads
of the job `stand_by`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from torch import nn

#: Asking may cost a request to Redis: not more often than this, seconds.
ASK_EVERY_S = 0.005
#: Niceness of threads that work beside the model: a quarter of a core where the model wants all of them.
BESIDE_NICENESS = 5

#: Nobody stands by for longer, seconds.
STAND_BY_LIMIT_S = 60.0

_local = threading.local()
#: Set while nobody is being let through.
_free = threading.Event()
_free.set()
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
    _free.clear()
    try:
        with _torch_as_outside():
            answer()
    finally:
        _free.set()
        _local.answer, _local.asked = answer, time.monotonic()


def stand_by() -> None:
    """On a thread that works beside the model's: wait while something is let through, so that the cores are its own."""
    if getattr(_local, "beside", False):
        _free.wait(STAND_BY_LIMIT_S)


@contextmanager
def _torch_as_outside() -> Iterator[None]:
    """What goes first does not run in the encoder's 16 bits, and what it keeps is no inference tensor."""
    torch = sys.modules.get("torch")
    with ExitStack() as stack:
        if torch is not None:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        yield


def work_beside(threads: int = 1) -> None:
    """Make this thread leave the cores to the model's: few threads for PyTorch, and a low priority where the system
    has one for each thread. The model's threads wait for each other at every step, so that one that is held up on its
    core holds up all."""
    import torch

    _local.beside = True
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = min(os.getpriority(os.PRIO_PROCESS, thread) + BESIDE_NICENESS, 19)
        os.setpriority(os.PRIO_PROCESS, thread, lower)


def give_way_within(encoder: nn.Module) -> None:
    """Make `encoder` call `give_way`, or beside the model's thread `stand_by`, before each of its layers: the members
    of its lists and sequences of modules."""
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
    stand_by()
