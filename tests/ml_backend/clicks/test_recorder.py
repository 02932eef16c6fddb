"""Nothing that was answered is lost, and nothing that is lost elsewhere reaches an answer."""

from __future__ import annotations

import json
import sqlite3
import statistics
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event

from ml_backend.clicks import ClickLog, recorder
from ml_backend.clicks.events import answer_event, dump
from ml_backend.clicks.journal import Journal, read
from tests.ml_backend.clicks.conftest import answer, disc, region, webhook
from tests.ml_backend.clicks.served import Server, Traffic


def events(data_dir: Path) -> set[str]:
    """Events of the answers in the database."""
    with sqlite3.connect(data_dir / "clicks.sqlite") as connection:
        return {row[0] for row in connection.execute("SELECT event FROM answers")}


def sessions(data_dir: Path) -> set[str]:
    """Sessions of the objects in the database that have a click."""
    with sqlite3.connect(data_dir / "clicks.sqlite") as connection:
        query = "SELECT session FROM objects WHERE id IN (SELECT object FROM clicks)"
        return {row[0] for row in connection.execute(query)}


@pytest.fixture
def log(data_dir: Path):
    made = ClickLog(data_dir=data_dir)
    yield made
    made.close()


def test_answers_and_webhooks_arrive(log, data_dir):
    click = answer([("a", 60.0, 40.0)])
    log.answered(click)
    log.webhook(webhook([region(disc(20), "mask-a")]))
    log.webhook({"action": "TASKS_CREATED"})
    log.webhook({"action": []})
    assert log.flush()
    assert events(data_dir) == {click.event}
    with sqlite3.connect(data_dir / "clicks.sqlite") as connection:
        assert connection.execute("SELECT outcome, last_iou FROM objects").fetchall() == [("submitted", 1.0)]
    assert (log.counts.taken, log.counts.written, log.counts.dropped, log.counts.refused) == (2, 2, 0, 0)
    log.close()
    assert list((data_dir / "clicks-journal").iterdir()) == [], "what is in the database is not kept twice"


def test_a_server_keeps_little_of_the_database_in_memory(log):
    """More would be filled with each click, and look like a leak."""
    assert log.flush()
    with log.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA cache_size").scalar() == -1024 * recorder.CACHE_MB
        assert recorder.CACHE_MB <= 8


def test_an_answer_waits_for_nothing(log):
    """The median cost of logging a click with a large mask, while clicks are written."""
    click = answer([("a", 60.0, 40.0)])
    big = region(disc(20), "mask-a")
    big["value"]["rle"] = big["value"]["rle"] * 2000
    spent = []
    for number in range(300):
        one = answer([(f"p{number}", 1.0, 1.0)], results=[big]) if number % 10 == 0 else click
        start = time.perf_counter()
        log.answered(one)
        spent.append(time.perf_counter() - start)
        time.sleep(0.001)
    assert statistics.median(spent) < 0.001


def test_a_locked_database_loses_nothing_and_fails_no_answer(data_dir, capture, served, monkeypatch):
    """Somebody opens the file with another program and keeps it locked."""
    monkeypatch.setattr(recorder, "RETRY_S", (0.05, 0.2))
    client, log = served()
    event.listen(log.engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=100"))
    body = capture("predict_interactive_plain_keypoint_3_prompts")

    def click(name: str) -> str:
        body["params"]["context"]["result"][0]["id"] = name
        assert client.post("/predict", json=body).status_code == 200
        return f"11:25:{name}"

    before = click("before")
    assert log.flush()
    other = sqlite3.connect(data_dir / "clicks.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    during = {click(f"p{number}") for number in range(50)}
    assert not log.flush(1.0)
    assert log.counts.database_up is False
    assert sessions(data_dir) == {before}
    other.execute("ROLLBACK")
    other.close()
    assert log.flush()
    assert sessions(data_dir) == {before, *during}
    assert (log.counts.database_up, log.counts.dropped) == (True, 0)


def test_clicks_outlive_a_process_that_never_reached_the_database(data_dir, monkeypatch):
    monkeypatch.setattr(recorder, "RETRY_S", (0.05, 0.2))
    nowhere = create_engine(f"sqlite:///{data_dir}/no/such/folder/clicks.sqlite")
    log = ClickLog(data_dir=data_dir, engine=nowhere)
    clicks = [answer([(f"p{number}", 1.0, 1.0)]) for number in range(5)]
    for click in clicks:
        log.answered(click)
    log.close()
    later = ClickLog(data_dir=data_dir)
    assert later.flush()
    assert events(data_dir) == {click.event for click in clicks}
    later.close()


@pytest.mark.parametrize("url", [None, "sqlite:////no/such/folder/clicks.sqlite"], ids=["sqlite", "database away"])
def test_kill_9_keeps_what_was_answered_a_second_ago(data_dir, capture, url):
    server = Server(data_dir, url)
    with Traffic(server.url, capture("predict_interactive_plain_keypoint_3_prompts")) as traffic:
        time.sleep(2.5)
        killed = server.kill()
    log = ClickLog(data_dir=data_dir)
    assert log.flush()
    log.close()
    old = {session for session, moment in traffic.answered if moment < killed - 1.0}
    assert len(old) > 5
    assert old <= sessions(data_dir)


def test_several_processes_write_one_object(data_dir):
    first, second = ClickLog(data_dir=data_dir), ClickLog(data_dir=data_dir)
    prompts = [(f"p{number}", float(number), 1.0) for number in range(20)]
    clicks = [answer(prompts[: number + 1], disc(5 + number)) for number in range(20)]
    for number, click in enumerate(clicks):
        (first, second)[number % 2].answered(click)
        time.sleep(0.01)
    assert first.flush()
    assert second.flush()
    with sqlite3.connect(data_dir / "clicks.sqlite") as connection:
        rows = connection.execute("SELECT seq, prompt, changed_px IS NULL FROM clicks ORDER BY seq").fetchall()
    assert rows == [(number + 1, f"p{number}", 0) for number in range(20)]
    first.close()
    second.close()


def test_an_event_that_cannot_be_written_stops_no_other(log, data_dir, monkeypatch):
    real = recorder.store.apply

    def apply(engine, found):
        if any(event.get("session") == "3:4:bad" for event in found):
            raise ValueError("a bug")
        real(engine, found)

    monkeypatch.setattr(recorder.store, "apply", apply)
    good, bad, other = (answer([(name, 1.0, 1.0)]) for name in ("good", "bad", "other"))
    for click in (good, bad, other):
        log.answered(click)
    assert log.flush()
    assert events(data_dir) == {good.event, other.event}
    refused = data_dir / "clicks-journal" / "refused.jsonl"
    assert [event["event"] for event in read(refused)] == [bad.event]
    assert log.counts.refused == 1
    log.close()
    monkeypatch.setattr(recorder.store, "apply", real)
    newer = ClickLog(data_dir=data_dir)
    assert newer.flush()
    newer.close()
    assert events(data_dir) == {good.event, bad.event, other.event}


def test_what_cannot_be_put_into_words_stops_no_other(log, data_dir, caplog):
    log.webhook({"action": "ANNOTATION_CREATED"})
    log.webhook({"action": "ANNOTATION_CREATED", "annotation": {"id": float("inf"), "task": 1, "project": 1}})
    log.webhook({"action": "ANNOTATION_CREATED", "annotation": {"id": 1, "result": 3}})
    click = answer([("a", 1.0, 1.0)])
    log.answered(click)
    assert log.flush()
    assert events(data_dir) == {click.event}
    assert not [record for record in caplog.records if record.exc_info], "foreseen: no traceback"


def test_half_a_character_stops_no_other(log, data_dir):
    odd, click = answer([("a", 1.0, 1.0)], image="/data/\ud83d.jpg"), answer([("b", 1.0, 1.0)])
    log.answered(odd)
    log.answered(click)
    assert log.flush()
    assert events(data_dir) == {click.event}
    assert [event["event"] for event in read(data_dir / "clicks-journal" / "refused.jsonl")] == [odd.event]


def test_a_line_cut_off_by_a_kill_is_left_out(data_dir):
    journal = Journal(data_dir)
    whole = dump(answer_event(answer([("a", 1.0, 1.0)])))
    journal.append([whole, whole[:40]])
    (segment,) = journal.take()
    assert list(read(segment)) == [json.loads(whole)]
    journal.close()


def test_segments_keep_their_order_and_only_the_dead_are_adopted(data_dir):
    alive, reader = Journal(data_dir), Journal(data_dir)
    alive.append(['{"n": 1}\n'])
    reader.adopt()
    assert reader.take() == []
    alive._segment.close()
    alive._lock_file.close()  # as the kernel does for a dead process
    reader.append(['{"n": 0}\n'])
    reader.adopt()
    reader.append(['{"n": 2}\n'])
    found = []
    while segments := reader.take():
        for segment in segments:
            found += [event["n"] for event in read(segment)]
            segment.unlink()
    assert found == [0, 1, 2] or found == [1, 0, 2]
    assert found[-1] == 2
    reader.close()
