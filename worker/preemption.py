"""How long work lets short work through: it asks, between two small steps, whether somebody is waiting.

There is one model in a process and one thread that runs it. A click must not wait until an image of a batch is encoded,
so whoever runs a batch job says what to do about clicks (`letting_through`), and the batch job calls `give_way` between
two layers of the encoder, and while it waits. The click is answered there and then, on the same thread; other threads
of the job `stand_by`. A GPU has the layers of the whole image queued by then: there the click's kernels have a stream
of their own, and go before.

A click that has to encode lets other clicks through as well, but only quick ones: what would encode too waits for its
turn (`before_long_work`), or else the last one to come would be served first.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from worker.contract import NotQuickError

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Asking may cost a request to Redis: not more often than this, seconds.
ASK_EVERY_S = 0.005
#: Niceness of threads that work beside the model: a quarter of a core where the model wants all of them.
BESIDE_NICENESS = 5

#: Between two looks at a GPU that computes, seconds.
LOOK_EVERY_S = 0.0002
#: Nobody stands by for longer, seconds.
STAND_BY_LIMIT_S = 60.0

_local = threading.local()
#: Set while nobody is being let through.
_free = threading.Event()
_free.set()
_watched: WeakSet[nn.Module] = WeakSet()
_watched_lock = threading.Lock()
#: What the model runs on, once it is loaded.
_device: torch.device | None = None


@contextmanager
def letting_through(answer_waiting: Callable[[], None], *, quick: bool = False) -> Iterator[None]:
    """In this block, on this thread, `give_way` calls `answer_waiting`, which does what is more urgent, if anything;
    with `quick` nothing of that may take long."""
    outer = getattr(_local, "answer", None), getattr(_local, "quick_alone", False)
    _local.answer, _local.quick_alone, _local.asked = answer_waiting, quick, 0.0
    try:
        yield
    finally:
        _local.answer, _local.quick_alone = outer


def before_long_work() -> None:
    """To be called before anything that takes long, with no lock held. Raises NotQuickError in what was let through as
    quick."""
    if getattr(_local, "quick", False):
        raise NotQuickError


def give_way() -> None:
    """Let what is more urgent go first. Does nothing outside of `letting_through`, and inside of what goes first."""
    answer = getattr(_local, "answer", None)
    if answer is None or time.monotonic() - _local.asked < ASK_EVERY_S:
        return
    outer, was_free = getattr(_local, "quick", False), _free.is_set()
    _local.answer, _local.quick = None, _local.quick_alone
    _free.clear()
    try:
        with _torch_as_outside():
            answer()
    finally:
        if was_free:
            _free.set()
        _local.answer, _local.quick, _local.asked = answer, outer, time.monotonic()


def stand_by() -> None:
    """On a thread that works beside the model's: wait while something is let through, so that the cores are its own."""
    if getattr(_local, "beside", False):
        _free.wait(STAND_BY_LIMIT_S)


def until_computed(device: torch.device) -> None:
    """Wait for what this thread has started on a GPU; what is more urgent goes first meanwhile."""
    if device.type != "cuda":
        return
    import torch

    with torch.cuda.device(device):
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
    while not done.query():  # type: ignore[no-untyped-call]
        give_way()
        time.sleep(LOOK_EVERY_S)


@contextmanager
def _torch_as_outside() -> Iterator[None]:
    """What goes first does not run in the encoder's 16 bits, what it keeps is no inference tensor, and on a GPU it does
    not queue up behind the encoder."""
    torch = sys.modules.get("torch")
    with ExitStack() as stack:
        if torch is not None:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if _device is not None and _device.type == "cuda":
                stack.enter_context(torch.cuda.stream(_urgent_stream(_device)))
        yield


@lru_cache
def _urgent_stream(device: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


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

    global _device  # noqa: PLW0603 - one model for each process
    with _watched_lock:
        device = next((one.device for one in encoder.parameters()), None)
        if _device is None or (device is not None and device.type == "cuda"):
            _device = device  # a second copy on the processor, for want of memory, changes nothing for the GPU's
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
