"""Training in several processes, as `python -m torch.distributed.run` starts them: each learns from its own part of the
batch, and all take the same step. On its own a process is rank 0 of 1, and nothing here does anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


@contextmanager
def together() -> Iterator[None]:
    """Meet the other processes, if there are any, and part when all are done: one that ends early, or without taking
    leave, would take the others with it."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process, from 0; 0 is the one that writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average(tensors: Iterable[Tensor]) -> None:
    """Replace the values of `tensors` by their mean over the processes, in one message."""
    if world() == 1:
        return
    kept = list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in kept])
    distributed.all_reduce(flat)
    for tensor, mean in zip(kept, (flat / world()).split([tensor.numel() for tensor in kept]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def first_says(value: float) -> float:
    """The value that rank 0 gave, in every process: clocks differ, and all must end at the same step."""
    if world() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(shared, 0)
    return float(shared)
