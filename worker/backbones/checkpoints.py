"""Published weights: where they are, what they must be, and how they get onto this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import requests

CHUNK = 1 << 20
TIMEOUT_S = 30.0


class CheckpointError(RuntimeError):
    """Weights are missing, damaged or not what they claim to be; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One published file. `sha256`: 64 hex digits; `size`: bytes."""

    file: str
    url: str
    size: int
    sha256: str
    licence: str


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_path(checkpoint: Checkpoint, data_dir: Path) -> Path:
    """Where the file lies once it is downloaded."""
    return data_dir / "checkpoints" / checkpoint.file


def verify(path: Path, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the file has the published size and SHA-256."""
    if path.stat().st_size != checkpoint.size or file_sha256(path) != checkpoint.sha256:
        raise CheckpointError(
            f"{path} is not the published {checkpoint.file}: its size or SHA-256 differs. "
            "Delete it and download it again; nothing was loaded from it."
        )


def download(checkpoint: Checkpoint, data_dir: Path, on_bytes: Callable[[int], None] = lambda _count: None) -> Path:
    """Fetch the file unless it is there already, verify it, and give its path.

    The bytes stream to `<file>.part`, which a later call continues after an interruption; only a verified file gets
    its final name. `on_bytes` is told the number of bytes that lie on disk so far. Raises CheckpointError.
    """
    target = checkpoint_path(checkpoint, data_dir)
    if target.exists():
        verify(target, checkpoint)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    if have > checkpoint.size:
        part.unlink()
        have = 0
    if have < checkpoint.size:
        _stream(checkpoint, part, have, on_bytes)
    try:
        verify(part, checkpoint)
    except CheckpointError as error:
        part.unlink()
        raise CheckpointError(
            f"What {checkpoint.url} sent is not the published {checkpoint.file}: its size or SHA-256 differs. "
            "It was deleted. Try again, or fetch the file by other means and pass its path as --checkpoint."
        ) from error
    part.replace(target)
    return target


def _stream(checkpoint: Checkpoint, part: Path, have: int, on_bytes: Callable[[int], None]) -> None:
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with requests.get(checkpoint.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            if response.status_code != HTTPStatus.PARTIAL_CONTENT:
                have = 0  # the server sends the whole file again
            with part.open("ab" if have else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    have += len(chunk)
                    if have > checkpoint.size:
                        break  # more than was published: verify() will refuse it
                    file.write(chunk)
                    on_bytes(have)
                file.flush()
                os.fsync(file.fileno())
    except requests.RequestException as error:
        raise CheckpointError(
            f"Could not download {checkpoint.url} ({type(error).__name__}). Check the network and try again: it "
            f"continues where it stopped. Or fetch the file by other means and pass its path as --checkpoint."
        ) from error
