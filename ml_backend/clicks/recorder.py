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

from ml_backend.arms import Arm, Arms, parse_modes
from ml_backend.clicks import store
from ml_backend.clicks.events import ANNOTATION_ACTIONS, AnsweredClick, Json, answer_event, dump, webhook_event
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.journal import Journal, read
from ml_backend.clicks.outcome import measure_pending
from ml_backend.clicks.people import read_key
from ml_backend.clicks.recovery import LabelStudioAnnotations, Recovery
from ml_backend.clicks.report import render
from ml_backend.clicks.schema import make_engine, migrate
from ml_backend.settings import Settings

log = logging.getLogger(__name__)

#: Events in memory. At one click a second this is three hours of a disk that does not answer.
QUEUE_SIZE = 10_000
#: What is older than this is in a file on the disk.
JOURNAL_EVERY_S = 0.2
#: Events in one transaction.
BATCH = 200
#: Each connection to SQLite keeps so much of its file. A server writes for months: with more its memory would grow
#: with each click until that is reached.
CACHE_MB = 4
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

    `start` takes up what an earlier process left in its journal; the first event starts it too. `recover` is called
    with the engine then, and makes the recovery that is woken after each round of writing.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        url: str | None = None,
        arms: Arms | None = None,
        engine: Engine | None = None,
        recover: Callable[[Engine], Recovery] | None = None,
    ) -> None:
        self.engine = engine or make_engine(url, data_dir, cache_mb=CACHE_MB)
        self.counts = Counts()
        self._arms = arms or Arms({None: "show"})
        self._make_recovery = recover
        self._recovery: Recovery | None = None
        self._data_dir = data_dir
        self._queue: Queue[AnsweredClick | Mapping[str, Any]] = Queue(QUEUE_SIZE)
        self._journalled = threading.Event()
        self._stop = threading.Event()
        self._in_memory: list[str] = []
        self._busy = threading.Lock()
        self._ready = False
        self._starting = threading.Lock()
        self._threads: list[threading.Thread] = []

    @classmethod
    def from_settings(cls, settings: Settings) -> ClickLog:
        """The click log that the settings describe. Raises ValueError, in words, where they cannot be followed."""
        recover = None
        if settings.recover and settings.label_studio_url and settings.label_studio_api_key:
            api = LabelStudioAnnotations(settings.label_studio_url, settings.label_studio_api_key.get_secret_value())

            def recover(engine: Engine) -> Recovery:
                return Recovery(engine, api)

        arms = Arms(parse_modes(settings.arms), unit=settings.arm_unit, seed=settings.arm_seed)
        return cls(data_dir=settings.data_dir, url=settings.clicks_database(), arms=arms, recover=recover)

    def start(self) -> None:
        """Begin to write; harmless when it has begun. Raises OSError if the data directory cannot be written."""
        with self._starting:
            if self._threads or self._stop.is_set():
                return
            self._journal = Journal(self._data_dir / "clicks-journal")
            if self._make_recovery:
                self._recovery = self._make_recovery(self.engine)
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
        """Log an event of Label Studio, if it is about annotations. Never blocks, never raises."""
        action = body.get("action")
        if isinstance(action, str) and action in ANNOTATION_ACTIONS:
            self._put(body)

    def report(self, chosen: Filter) -> str:
        """The report as an HTML page, users as pseudonyms. Raises SQLAlchemyError if the database is away."""
        if not self._ready:
            migrate(self.engine)
        return render(self.engine, chosen=chosen, key=read_key(self._data_dir))

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until all that was logged is in the database and measured; False if that took too long."""
        self.start()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._idle():
                return True
            time.sleep(0.02)
        return False

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is there and stop. What the database does not take in time stays in the journal."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._threads:
            for thread in self._threads:
                thread.join(timeout_s)
            self._journal.close()
        if self._recovery:
            self._recovery.close()
        self.engine.dispose()

    def _put(self, item: AnsweredClick | Mapping[str, Any]) -> None:
        try:
            if not self._threads:
                self.start()
            self._queue.put_nowait(item)
            self.counts.taken += 1
        except OSError as error:
            self.counts.dropped += 1
            log.error("A click was not logged: %s.", error)
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
                if self._recovery and busy:
                    self._recovery.wake()
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
            kept = self._journal.refuse(dump(events[0]))
            log.error("One event of the click log cannot be written (%.200r); it is kept in %s.", error, kept)


def _line(item: AnsweredClick | Mapping[str, Any]) -> str | None:
    try:
        event = answer_event(item) if isinstance(item, AnsweredClick) else webhook_event(item)
        return dump(event) if event is not None else None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        log.warning("An event is not one of Label Studio's and was not logged: %.200r", error)
    except Exception:  # a body that nobody foresaw must not stop the log
        log.exception("An event could not be put into the click journal.")
    return None
