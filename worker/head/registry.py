"""Which heads there are and which of them each project uses: a folder, and Redis where there is one.

The folder `data_dir/heads` holds NAME/head.safetensors, NAME/head.json and in-use.json. With Redis, every process keeps
a copy of the same: the choice with the higher revision wins, on either side, so a worker on another machine gets heads
that it never saw, and a Redis that lost everything is filled again by the first process that looks. No torch in here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from pydantic import ValidationError

from worker.contract import HEAD_FILES_KEY, HEADS_IN_USE_FILE, HEADS_IN_USE_KEY, HeadChoice, HeadsInUse

log = logging.getLogger(__name__)

#: A running worker asks Redis this often, seconds, whether another head is in use. The folder is looked at each time.
LOOK_EVERY_S = 1.0
#: How many earlier heads of a project can be gone back to.
KEPT_EARLIER = 20
LOCK_S = 30
FILES = ("head.safetensors", "head.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

DEFAULT = "default"
SHIPPED = "shipped"


class HeadRegistry:
    """The heads of a data directory, kept the same in Redis. Safe to use from several threads and processes."""

    def __init__(self, data_dir: Path, client: redis.Redis | None = None) -> None:
        self.folder = data_dir / "heads"
        self._file = data_dir / HEADS_IN_USE_FILE
        self._redis = client
        self._lock = threading.RLock()
        self._read: tuple[tuple[int, int] | None, HeadsInUse] = (None, HeadsInUse())
        self._looked = -LOOK_EVERY_S

    # --- reading ------------------------------------------------------------------------------------------------------

    def in_use(self, *, fresh: bool = False) -> HeadsInUse:
        """The choices as they are now; with Redis at most `LOOK_EVERY_S` old unless `fresh`. Never raises."""
        with self._lock:
            local = self._local()
            if self._redis is None or (not fresh and time.monotonic() - self._looked < LOOK_EVERY_S):
                return local
            self._looked = time.monotonic()
            try:
                return self._synchronised(local)
            except (redis.RedisError, OSError) as error:
                log.warning("The heads could not be compared with Redis (%s); going on with those here.", error)
                return local

    def names(self) -> list[str]:
        """Names of all heads, in order of their making; those that only Redis has are fetched."""
        with self._lock:
            if self._redis is not None:
                for name in {_text(field).partition("/")[0] for field in self._redis.hkeys(HEAD_FILES_KEY)}:
                    self._fetch(name)
            found = [path.parent for path in self.folder.glob("*/head.safetensors")]
            return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]

    def path(self, name: str) -> Path:
        """Where the head `name` is, fetched from Redis if it is not here. Raises ValueError for a name of no head."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a head; they have letters, digits, '.', '_' and '-'.")
        found = self.folder / name / FILES[0]
        if not found.is_file() and self._redis is not None:
            with self._lock:
                self._fetch(name)
        if not found.is_file():
            raise ValueError(f"There is no head {name}. `bald-sam heads list` names those there are.")
        return found

    def describe(self, name: str) -> dict[str, Any]:
        """The description of a head (backbone, features, notes). Raises ValueError when it cannot be read."""
        path = self.path(name).with_suffix(".json")
        try:
            described = json.loads(path.read_text())
            return {"backbone": str(described["backbone"]), "notes": {}, **described}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The head {name} cannot be read ({error}). Train another one.") from error

    # --- changing -----------------------------------------------------------------------------------------------------

    def new_name(self, stem: str) -> str:
        """Make the folder of the next version of `stem`, and return its name: `stem-v1`, `stem-v2`, ..."""
        with self._lock, self._exclusive():
            taken = [*self.names(), *(path.name for path in self.folder.iterdir() if path.is_dir())]
            versions = [int(name[len(stem) + 2 :]) for name in taken if re.fullmatch(rf"{re.escape(stem)}-v\d+", name)]
            name = f"{stem}-v{max(versions, default=0) + 1}"
            (self.folder / name).mkdir()
            return name

    def publish(self, name: str) -> None:
        """Give the files of a head to the workers on other machines. Nothing to do without Redis."""
        path = self.path(name)
        if self._redis is not None:
            contents: dict[str, bytes] = {f"{name}/{file}": path.with_name(file).read_bytes() for file in FILES}
            self._redis.hset(HEAD_FILES_KEY, mapping=contents)  # type: ignore[arg-type]

    def use(self, name: str | None, project: int | None = None, *, pin: bool = False) -> HeadChoice:
        """Let a project (None: all projects without a choice of their own) use a head; None is the shipped one.

        A choice that was pinned stays so only with `pin`. Raises ValueError for a head that is missing or unreadable.
        """
        chosen = self._choice(name)

        def change(own: HeadChoice | None, held: HeadChoice) -> HeadChoice:
            earlier = own.earlier if own else ()
            if held.head != name:
                earlier = (held.head, *earlier)[:KEPT_EARLIER]
            return chosen.model_copy(update={"pinned": pin, "earlier": earlier})

        return self._change(project, change)

    def pin(self, project: int | None = None, *, pinned: bool = True) -> HeadChoice:
        """Keep the head in use whatever is learnt, or stop keeping it."""

        def change(own: HeadChoice | None, held: HeadChoice) -> HeadChoice:
            return (own or held.model_copy(update={"earlier": ()})).model_copy(update={"pinned": pinned})

        return self._change(project, change)

    def rollback(self, project: int | None = None) -> HeadChoice:
        """Go back to the head in use before, and pin it: what was learnt should not come back by itself.

        Raises ValueError where there was none.
        """
        found = self.in_use(fresh=True).choices.get(DEFAULT if project is None else str(project))
        if found is None or not found.earlier:
            raise ValueError("There is no earlier head to go back to. `bald-sam heads list` shows what there is.")
        chosen, rest = self._choice(found.earlier[0]), found.earlier[1:]
        update = {"pinned": True, "earlier": rest}
        return self._change(project, lambda own, held: chosen.model_copy(update=update))

    def _choice(self, name: str | None) -> HeadChoice:
        """The choice of a head that can be read, and that workers on other machines can get."""
        if name is None:
            return HeadChoice()
        backbone = str(self.describe(name)["backbone"])
        self.publish(name)
        return HeadChoice(head=name, digest=digest(self.path(name)), backbone=backbone)

    def _change(self, project: int | None, change: Callable[[HeadChoice | None, HeadChoice], HeadChoice]) -> HeadChoice:
        """Replace a choice by `change(its own choice, the one that holds)`."""
        scope = DEFAULT if project is None else str(project)
        with self._lock, self._exclusive():
            current = self._local()
            if self._redis is not None:
                current = self._synchronised(current)
            made = change(current.choices.get(scope), current.of(project))
            changed = HeadsInUse(revision=current.revision + 1, choices={**current.choices, scope: made})
            self._write(changed)
            if self._redis is not None:
                self._redis.set(HEADS_IN_USE_KEY, changed.model_dump_json())
            return made

    # --- folder and Redis ---------------------------------------------------------------------------------------------

    def _local(self) -> HeadsInUse:
        try:
            status = self._file.stat()
        except OSError:
            return self._read[1] if self._redis is not None else HeadsInUse()
        stamp = (status.st_mtime_ns, status.st_ino)
        if self._read[0] != stamp:
            try:
                self._read = stamp, HeadsInUse.model_validate_json(self._file.read_bytes())
            except (OSError, ValidationError) as error:
                log.error("%s cannot be read; going on with the heads of before: %s", self._file, error)
                self._read = stamp, self._read[1]
        return self._read[1]

    def _write(self, in_use: HeadsInUse) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self._file, (in_use.model_dump_json(indent=1) + "\n").encode())

    def _synchronised(self, local: HeadsInUse) -> HeadsInUse:
        """Whichever of folder and Redis is newer, after the other one was brought up to it."""
        assert self._redis is not None
        held = self._redis.get(HEADS_IN_USE_KEY)
        try:
            remote = HeadsInUse.model_validate_json(held) if isinstance(held, bytes) else HeadsInUse()
        except ValidationError as error:
            log.error("The choice of heads in Redis cannot be read (%s); it is replaced by the one here.", error)
            remote = HeadsInUse()
        if remote.revision > local.revision:
            for choice in remote.choices.values():
                if choice.head is not None:
                    self._fetch(choice.head, choice.digest)
            self._write(remote)
            return self._local()
        if local.revision > remote.revision:
            for name in {choice.head for choice in local.choices.values() if choice.head is not None}:
                self.publish(name)
            self._redis.set(HEADS_IN_USE_KEY, local.model_dump_json())
        return local

    def _fetch(self, name: str, wanted: str | None = None) -> None:
        """Bring a head from Redis into the folder, unless it is there (and has the digest that is wanted)."""
        assert self._redis is not None
        here = self.folder / name / FILES[0]
        if not _NAME.fullmatch(name) or (here.is_file() and wanted in (None, digest(here))):
            return
        held = self._redis.hmget(HEAD_FILES_KEY, [f"{name}/{file}" for file in FILES])
        contents = [content for content in held if isinstance(content, bytes)]
        if len(contents) < len(FILES):
            log.warning("Redis does not hold the files of the head %s.", name)
            return
        here.parent.mkdir(parents=True, exist_ok=True)
        # The numbers last: a head without them is none.
        for file, content in reversed(list(zip(FILES, contents, strict=True))):
            _replace(self.folder / name / file, content)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time, on this machine and, with Redis, on all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._redis is None:
                yield
                return
            with self._redis.lock("bald-sam:heads:lock", timeout=LOCK_S, blocking_timeout=LOCK_S):
                yield


def digest(path: Path) -> str:
    """Start of the SHA-256 of a head's numbers; its id ends with it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one piece: whoever reads it finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
