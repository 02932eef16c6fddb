"""From answers and webhooks to clicks, objects and outcomes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, insert, select

from ml_backend.clicks import AnsweredClick, seen_regions
from ml_backend.clicks.events import answer_event, webhook_event
from ml_backend.clicks.outcome import iou, measure_pending
from ml_backend.clicks.schema import answers, clicks, make_engine, metadata, migrate, objects
from ml_backend.clicks.store import _answer_row, _object_row, apply
from tests.ml_backend.clicks.conftest import HEIGHT, HIDDEN, WIDTH, answer, disc, region, webhook


def write(engine: Engine, *things: AnsweredClick | dict[str, Any]) -> None:
    """Write answers and webhooks as the recorder does, and measure."""
    events = [answer_event(thing) if isinstance(thing, AnsweredClick) else webhook_event(thing) for thing in things]
    apply(engine, [event for event in events if event is not None])
    while measure_pending(engine):
        pass


def pick(rows: Sequence[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


A, B, C = ("a", 60.0, 40.0), ("b", 70.0, 45.0), ("c", 30.0, 20.0, False)


def test_placed_moved_deleted_and_undone(engine, table):
    moved = ("b", 72.0, 45.0)
    write(engine, answer([A]), answer([A, B]), answer([A, moved]), answer([A, C]), answer([A, C, ("d", 1.0, 2.0)]))
    assert pick(table("clicks"), "seq", "kind", "click", "prompt", "x", "from_x", "positive") == [
        (1, "placed", 1, "a", 60, None, 1),
        (2, "placed", 2, "b", 70, None, 1),
        (3, "moved", 2, "b", 72, 70, 1),
        (4, "deleted", 2, "b", 72, None, 1),
        (5, "placed", 3, "c", 30, None, 0),
        (6, "placed", 4, "d", 1, None, 1),
    ]
    (thing,) = table("objects")
    assert (thing["clicks"], thing["session"], thing["seconds"]) == (5, "3:4:a", pytest.approx(4.25))
    assert pick(table("clicks"), "answer")[3] == (None,), "the answer belongs to the click, not to the undo before it"


def test_a_box_is_told_from_a_click_and_follows_nothing(engine, table):
    ring = (10.0, 10.0, True)
    write(engine, answer([("a", 10.0, 10.0, True, 50.0, 40.0)], proposal=ring))
    write(engine, answer([("a", 10.0, 10.0, True, 55.0, 40.0)]))
    assert pick(table("clicks"), "kind", "x", "x1", "y1", "origin", "distance_px", "followed") == [
        ("placed", 10, 50, 40, "human", None, None),
        ("moved", 10, 55, 40, "human", None, 0),
    ]


def test_an_older_database_is_brought_up_to_date(data_dir):
    old = make_engine(None, data_dir / "old")
    migrate(old, "0001")
    box = answer_event(answer([("a", 10.0, 10.0, True, 50.0, 40.0)]))
    click = answer_event(answer([("b", 10.0, 10.0)]))
    with old.begin() as connection:
        for number, event in enumerate((box, click)):
            connection.execute(insert(objects).values(id=number, **(_object_row(event) | {"stale": False})))
            connection.execute(insert(answers).values(id=number, **_answer_row(event, number)))
        columns = "object, seq, kind, click, prompt, time, x, y, positive, origin, proposal_shown"
        for number in range(2):
            connection.exec_driver_sql(
                f"INSERT INTO clicks ({columns}) VALUES ({number}, 1, 'placed', 1, 'p', 1, 10, 10, 1, 'human', 0)"
            )
    migrate(old)
    assert measure_pending(old) == 1, "only what was begun with a box is derived again"
    with old.connect() as connection:
        assert connection.execute(select(clicks.c.x1).order_by(clicks.c.object)).all() == [(50.0,), (None,)]
        context = MigrationContext.configure(connection, opts={"version_table": "clicks_version"})
        assert compare_metadata(context, metadata) == [], "the migrations make the tables that the code expects"
    old.dispose()


def test_the_order_of_arrival_does_not_matter(engine, table, data_dir):
    clicks = [answer([A], proposal=(70, 45, True)), answer([A, B], proposal=(30, 20, False)), answer([A, B, C])]
    hook = webhook([region(disc(20), "mask-a")])
    seen = []
    for order in list(itertools.permutations(clicks))[:6]:
        with engine.begin() as connection:
            for name in ("masks", "clicks", "answers", "final_masks", "objects", "annotation_events"):
                connection.exec_driver_sql(f"DELETE FROM {name}")
        for click in order:
            write(engine, click)
        write(engine, hook)
        seen.append(
            pick(table("clicks"), "seq", "prompt", "origin", "distance_px", "iou_to_final", "delta_iou", "think_s")
        )
    assert all(rows == seen[0] for rows in seen)
    assert [row[2] for row in seen[0]] == ["human", "suggested", "suggested"]


def test_repeated_events_change_nothing(engine, table):
    things = [answer([A]), answer([A, B]), webhook([region(disc(20), "mask-a")])]
    events = [answer_event(things[0]), answer_event(things[1]), webhook_event(things[2])]
    apply(engine, events)
    apply(engine, events)
    apply(engine, events[:1])
    assert [len(table(name)) for name in ("objects", "answers", "clicks", "annotation_events")] == [1, 2, 2, 1]


def test_what_counts_as_suggested(engine, table):
    ring = (70.0, 45.0, True)
    inside, edge, beyond = ("b", 72.0, 46.0), ("b", 73.0, 45.0), ("b", 73.1, 45.0)
    for name, click in {"p": inside, "q": edge, "r": beyond, "s": (*inside, False)}.items():
        write(engine, answer([(name, 60.0, 40.0)], proposal=ring), answer([(name, 60.0, 40.0), click], proposal=ring))
    second = [row for row in table("clicks") if row["click"] == 2]
    assert pick(second, "origin", "followed", "sign_matched") == [
        ("suggested", 1, 1),
        ("suggested", 1, 1),
        ("human", 0, 1),
        ("human", 1, 0),
    ]
    assert pick(second, "proposal_x", "proposal_y", "proposal_positive", "proposal_score") == [(70, 45, 1, 0.3)] * 4
    assert second[2]["distance_px"] == pytest.approx(3.1)


def test_a_hidden_proposal_is_recorded_and_never_followed(engine, table):
    ring = (70.0, 45.0, True)
    write(engine, answer([A], proposal=ring, arm=HIDDEN), answer([A, B], proposal=ring, arm=HIDDEN))
    second = table("clicks")[1]
    assert (second["origin"], second["proposal_shown"], second["followed"], second["distance_px"]) == ("human", 0, 1, 0)
    assert table("objects")[0]["arm"] == "hide"


def test_a_proposal_that_was_not_yet_on_screen_was_not_followed(engine, table):
    ring = (70.0, 45.0, True)
    write(engine, answer([A], proposal=ring, received=100.0, took=2.0), answer([A, B], received=101.0))
    second = table("clicks")[1]
    assert (second["origin"], second["proposal_x"], second["think_s"]) == ("human", None, None)


def test_after_an_error_nothing_is_on_screen(engine, table):
    ring = (70.0, 45.0, True)
    write(
        engine,
        answer([A], proposal=ring, received=100.0),
        answer([A, C], received=101.0, error="No answer within 90 s.", proposal=None),
        answer([A, C, B], received=103.0),
    )
    assert pick(table("clicks"), "prompt", "origin", "proposal_x") == [
        ("a", "human", None),
        ("c", "human", 70.0),
        ("b", "human", None),
    ]
    assert table("answers")[1]["error"] == "No answer within 90 s."


def test_outcome_against_the_submitted_mask(engine, table):
    masks, final = [disc(10), disc(15), disc(19.5)], disc(20)
    prompts = [A, B, ("c", 50.0, 40.0)]
    for k, mask in enumerate(masks, 1):
        write(engine, answer(prompts[:k], mask))
    assert pick(table("clicks"), "iou_to_final", "delta_iou") == [(None, None)] * 3
    write(engine, webhook([region(final, "mask-a", "Dog")]))
    expected = [iou(mask, final) for mask in masks]
    found = pick(table("clicks"), "iou_to_final", "delta_iou", "changed_px", "area")
    assert [row[0] for row in found] == pytest.approx(expected)
    assert [row[1] for row in found] == pytest.approx(np.diff([0.0, *expected]))
    assert [row[2] for row in found] == [
        int((a ^ b).sum()) for a, b in itertools.pairwise([np.zeros_like(final), *masks])
    ]
    (thing,) = table("objects")
    assert (thing["outcome"], thing["label"], thing["user_id"], thing["lead_time"], thing["annotation"]) == (
        "submitted",
        "Dog",
        1,
        6.5,
        9,
    )
    assert thing["final_area"] == final.sum()
    assert expected[1] < 0.85 < 0.95 > expected[2] > 0.9
    assert (thing["clicks_85"], thing["clicks_90"], thing["clicks_95"]) == (3, 3, None)
    assert thing["seconds_90"] == pytest.approx(thing["seconds"])


def test_a_later_edit_moves_the_goal(engine, table):
    write(engine, answer([A], disc(10)), webhook([region(disc(20), "mask-a")]))
    first = table("clicks")[0]["iou_to_final"]
    edited = webhook([region(disc(10), "mask-a")], action="ANNOTATION_UPDATED", updated_at="2026-11-22T14:00:00Z")
    write(engine, edited)
    assert table("clicks")[0]["iou_to_final"] == 1.0 > first
    write(engine, webhook([region(disc(20), "mask-a")]))
    assert table("clicks")[0]["iou_to_final"] == 1.0, "an older event that comes late changes nothing"


def test_rejected_deleted_and_skipped(engine, table):
    outcome = lambda: pick(table("objects"), "mask_id", "outcome")  # noqa: E731
    write(engine, answer([A]), answer([("z", 1.0, 1.0)]), webhook([region(disc(20), "mask-a")]))
    assert outcome() == [("mask-a", "submitted"), ("mask-z", "rejected")]
    write(engine, {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 9}], "project": {"id": 3}})
    assert outcome() == [("mask-a", "deleted"), ("mask-z", "rejected")]
    write(engine, answer([("k", 1.0, 1.0)], task=5), webhook([], task=5, annotation=10, was_cancelled=True))
    assert outcome()[2] == ("mask-k", "rejected")


def test_accepted_and_user_from_drafts(engine, table):
    draft = {"user": "anna@example.com", "result": [{"id": "mask-a"}, {"id": "kp"}]}
    user, seen = seen_regions({"drafts": [draft]})
    assert (user, seen) == ("anna@example.com", ("mask-a", "kp"))
    assert seen_regions({"drafts": []}) == (None, ())
    write(engine, answer([A]), answer([("z", 1.0, 1.0)], user=user, seen=seen))
    assert pick(table("objects"), "mask_id", "user_email") == [("mask-a", user), ("mask-z", user)]
    assert [row["accepted"] is not None for row in table("objects")] == [True, False]


def test_another_annotator_of_the_task_is_not_rejected(engine, table):
    write(engine, answer([A], user="anna@example.com"), webhook([region(disc(20), "mask-a")], user=1))
    write(
        engine,
        answer([("z", 1.0, 1.0)], task=5, user="ben@example.com"),
        webhook([region(disc(20), "mask-z")], task=5, annotation=10, user=2),
    )
    write(engine, answer([("y", 1.0, 1.0)], task=6, user="ben@example.com"), webhook([], task=6, annotation=11, user=1))
    assert table("objects")[2]["outcome"] is None


def test_boxes_and_a_mask_that_cannot_be_read(engine, table):
    box = answer([("b", 10.0, 12.0, True, 50.0, 60.0)])
    broken = region(disc(20), "mask-b")
    broken["value"]["rle"] = [1, 2, 3]
    write(engine, box, webhook([broken]))
    assert table("clicks")[0]["iou_to_final"] is None
    assert table("objects")[0]["outcome"] == "submitted"


def test_iou_of_small_masks():
    a, b = np.zeros((2, 3), bool), np.zeros((2, 3), bool)
    assert iou(a, b) == 1.0
    a[0] = True
    assert iou(a, b) == 0.0
    b[:, 0] = True
    assert iou(a, b) == 1 / 4
    assert disc(3).shape == (HEIGHT, WIDTH)
