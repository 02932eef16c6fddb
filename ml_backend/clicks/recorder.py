"""ClickLog: what the app calls. An answer costs one `put` into a queue; two threads do the rest.

answer path --queue--> journal thread (files, every 0.2 s) --segments--> database thread. The database may be away for
as long as the disk has room: segments wait. Nothing here ever raises into an answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from ml_backend.clicks import store
from ml_backend.clicks.arms import Arm, Arms
from ml_backend.clicks.events import AnsweredClick, Json, answer_event, dump, webhook_event
from ml_backend.clicks.journal import Journal, read
from ml_backend.clicks.outcome import measure_pending
from ml_backend.clicks.schema import make_engine, migrate

log = logging.getLogger(__name__)

#: Events in memory. At one click a second this is three hours of a disk that does not answer.
QUEUE_SIZE = 10_000
#: What is older than this is in a file on the disk.
JOURNAL_EVERY_S = 0.2
#: Events in one transaction.
BATCH = 200
#: Pause after the database did not answer: first and longest, seconds.
RETRY_S = (0.5, 15.0)
#: How often journals of dead processes are looked for.
ADOPT_EVERY_S = 30.0


@dataclass(slots=True)
class Counts:
    """For /metrics: events taken, written to the database, dropped because memory and disk were full, and failed."""

    taken: int = 0
    written: int = 0
    dropped: int = 0
    refused: int = 0
    database_up: bool = True


class ClickLog:
    """The click log of one process. All methods are safe in any thread.

    `on_written` is called in the database thread after each round (recovery waits for it).
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        url: str | None = None,
        arms: Arms | None = None,
        engine: Engine | None = None,
        on_written: Callable[[Engine], None] | None = None,
    ) -> None:
        self.engine = engine or make_engine(url, data_dir)
        self.counts = Counts()
        self._arms = arms or Arms({None: "show"})
        self._on_written = on_written
        self._queue: Queue[AnsweredClick | Mapping[str, Any]] = Queue(QUEUE_SIZE)
        self._journal = Journal(data_dir / "clicks-journal")
        self._journalled = threading.Event()
        self._stop = threading.Event()
        self._in_memory: list[str] = []
        self._busy = threading.Lock()
        self._ready = False
        self._threads = [
            threading.Thread(target=self._write_journal, name="click-journal", daemon=True),
            threading.Thread(target=self._write_database, name="click-database", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def arm(self, project: int, task: int, session: str, user: str | None = None) -> Arm:
        """The experiment arm of an object, to be asked before its click is answered."""
        return self._arms.arm(project, task, session, user)

    def answered(self, click: AnsweredClick) -> None:
        """Log a click after its answer has left. Never blocks, never raises."""
        self._put(click)

    def webhook(self, body: Mapping[str, Any]) -> None:
        """Log an annotation event of Label Studio. Never blocks, never raises."""
        self._put(body)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until all that was logged is in the database and measured; False if that took too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._idle():
                return True
            time.sleep(0.02)
        return False

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is there and stop. What the database does not take in time stays in the journal."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout_s)
        self._journal.close()
        self.engine.dispose()

    def _put(self, item: AnsweredClick | Mapping[str, Any]) -> None:
        try:
            self._queue.put_nowait(item)
            self.counts.taken += 1
        except Full:
            self.counts.dropped += 1
            log.error("A click was not logged: the disk of the click journal has not answered for too long.")

    def _idle(self) -> bool:
        with self._busy:
            if self._queue.unfinished_tasks or self._in_memory or not self._ready:
                return False
            return not self._journal.take() and measure_pending(self.engine, 1) == 0

    # --- journal thread -----------------------------------------------------------------------------------------------

    def _write_journal(self) -> None:
        while not (self._stop.is_set() and self._queue.empty()):
            items = self._drain()
            self._in_memory += [line for line in map(_line, items) if line is not None]
            while self._in_memory:
                try:
                    self._journal.append(self._in_memory)
                    self._in_memory = []
                except OSError as error:
                    log.error("The click journal cannot be written (%s); trying again.", error)
                    if self._stop.wait(1.0):
                        break
            for _ in items:
                self._queue.task_done()
            if items:
                self._journalled.set()

    def _drain(self) -> list[AnsweredClick | Mapping[str, Any]]:
        """Everything in the queue, after waiting for the first item and then for more to share its disk write."""
        try:
            items = [self._queue.get(timeout=JOURNAL_EVERY_S)]
        except Empty:
            return []
        self._stop.wait(JOURNAL_EVERY_S / 4)
        while len(items) < BATCH * 5:
            try:
                items.append(self._queue.get_nowait())
            except Empty:
                break
        return items

    # --- database thread ----------------------------------------------------------------------------------------------

    def _write_database(self) -> None:
        pause, adopted = RETRY_S[0], 0.0
        while True:
            stopping = self._stop.is_set() and not self._threads[0].is_alive()
            try:
                with self._busy:
                    if not self._ready:
                        migrate(self.engine)
                        self._ready = True
                    if time.monotonic() - adopted > ADOPT_EVERY_S or not adopted:
                        self._journal.adopt()
                        adopted = time.monotonic()
                    busy = self._write_segments() + measure_pending(self.engine)
                if self._on_written and busy:
                    self._on_written(self.engine)
                pause, self.counts.database_up = RETRY_S[0], True
            except Exception as error:  # whatever it is, the segments are still there
                self.counts.database_up = False
                log.warning("The click log's database does not take clicks (%s); they wait in the journal.", error)
                if stopping:
                    return
                self._stop.wait(pause)
                pause = min(pause * 2, RETRY_S[1])
                continue
            if stopping and not busy:
                return
            if not busy:
                self._journalled.wait(JOURNAL_EVERY_S)
                self._journalled.clear()

    def _write_segments(self) -> int:
        count = 0
        for segment in self._journal.take():
            events = list(read(segment))
            for start in range(0, len(events), BATCH):
                self._write(events[start : start + BATCH])
            segment.unlink()
            count += len(events)
        return count

    def _write(self, events: list[Json]) -> None:
        try:
            store.apply(self.engine, events)
            self.counts.written += len(events)
        except OperationalError:
            raise
        except Exception as error:
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise
            if len(events) > 1:  # find the one that cannot be written
                for event in events:
                    self._write([event])
                return
            self.counts.refused += 1
            log.exception(
                "One event of the click log cannot be written; it is kept in %s.", self._journal.refuse(dump(events[0]))
            )


def _line(item: AnsweredClick | Mapping[str, Any]) -> str | None:
    try:
        event = answer_event(item) if isinstance(item, AnsweredClick) else webhook_event(item)
        return dump(event) if event is not None else None
    except Exception:  # a body that nobody foresaw must not stop the log
        log.exception("An event could not be put into the click journal.")
        return None
