"""What a worker process says of itself, for the status page and for metrics. Never loads anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import socket
import sys
from functools import cache
from typing import Any

#: What decides how an answer comes out, and what an advisory would name.
PACKAGES = ("bald-sam", "torch", "torchvision", "segment-anything", "laplace-torch", "numpy", "pillow", "redis", "rq")


def facts() -> dict[str, Any]:
    """`host`, `pid`, `memory` (bytes), `versions`; once the model is loaded `backbone`, `device` and `strategy`, and
    `caches`: `ByteLRU.usage` of `embeddings`, `logits` and `images`; on a GPU `device_memory` (bytes in use) and its
    total."""
    said: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "memory": memory()}
    said["versions"] = versions()
    runtime = sys.modules.get("worker.runtime")
    current = runtime.loaded() if runtime is not None else None
    if current is None:
        return said
    caches = {"embeddings": current.embeddings, "logits": current.logits, "images": current.pixels}
    said["caches"] = {name: cache.usage() for name, cache in caches.items()}
    backbone = current.loaded_backbone
    if backbone is not None:
        said |= {"backbone": backbone.id, "device": str(backbone.device), "strategy": current.options.strategy}
        if backbone.device.type == "cuda":
            said |= _device_memory(backbone.device)
    return said


def memory() -> int:
    """Resident memory of this process, bytes; where the system does not say, the most it ever was."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 (a hundred times as often as any other file)
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def versions() -> dict[str, str]:
    """Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device_memory(device: Any) -> dict[str, int]:
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # a device that answers nothing any more; the work itself says so better
        return {}
    return {"device_memory": total - free, "device_memory_total": total}
