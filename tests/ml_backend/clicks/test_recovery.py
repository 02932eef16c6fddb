"""A mask that was pending on submit comes back, once, and only into what nobody has touched since."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from sqlalchemy import update

from ml_backend.clicks import ClickLog, recovery
from ml_backend.clicks.events import answer_event, webhook_event
from ml_backend.clicks.recovery import Recovery, recover_due
from ml_backend.clicks.schema import recoveries
from ml_backend.clicks.store import apply
from tests.ml_backend.clicks.conftest import answer, disc, region, webhook

PROMPTS = [("a", 60.0, 40.0), ("b", 70.0, 45.0)]
OTHER = region(disc(5), "earlier")


def leftover(id_: str) -> dict[str, Any]:
    """A prompt as Label Studio saves it."""
    return {
        "id": id_,
        "type": "keypoint",
        "from_name": "kp",
        "to_name": "image",
        "value": {"x": 1, "y": 2.5, "width": 0.5},
    }


def ring() -> dict[str, Any]:
    return {"id": "ring", "type": "keypointlabels", "from_name": "next", "to_name": "image", "value": {"x": 3, "y": 4}}


class Studio:
    """Annotations that can be read and replaced; `log` gets the webhook that Label Studio sends for it."""

    def __init__(self, result: list[dict[str, Any]] | None) -> None:
        self.result = copy.deepcopy(result)
        self.writes = 0
        self.down = 0

    def get(self, annotation: int) -> list[dict[str, Any]] | None:
        if self.down:
            self.down -= 1
            raise ConnectionError("no answer")
        return copy.deepcopy(self.result)

    def set(self, annotation: int, result: Any) -> None:
        self.writes += 1
        self.result = list(result)


def submit(engine, result, **more) -> None:
    clicks = [answer(PROMPTS[:1], disc(10), proposal=(70, 45, True)), answer(PROMPTS, disc(18), proposal=(1, 1, False))]
    apply(engine, [*(answer_event(click) for click in clicks), webhook_event(webhook(result, **more))])


def test_the_lost_mask_is_back_and_the_leftovers_are_gone(engine, table):
    result = [OTHER, leftover("a"), leftover("b"), ring()]
    submit(engine, result)
    studio = Studio(result)
    recover_due(engine, studio)
    restored = region(disc(18), "mask-a")
    assert studio.result == [OTHER, restored]
    (row,) = table("recoveries")
    assert (row["status"], row["reason"]) == (
        "restored",
        "Mask mask-a was put back, 3 leftover prompts and proposals removed.",
    )
    # Label Studio reports our own change, and may report anything twice.
    for _ in range(2):
        hook = webhook(studio.result, action="ANNOTATION_UPDATED", updated_at="2026-11-22T13:40:00Z")
        apply(engine, [webhook_event(hook)])
        recover_due(engine, studio)
    assert studio.writes == 1
    assert table("objects")[0]["outcome"] == "submitted"


def test_the_same_webhook_twice_is_one_recovery(engine, table):
    result = [leftover("a"), leftover("b")]
    submit(engine, result)
    apply(engine, [webhook_event(webhook(result))])
    studio = Studio(result)
    recover_due(engine, studio)
    recover_due(engine, studio)
    assert (studio.writes, len(table("recoveries"))) == (1, 1)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ([leftover("a"), leftover("b"), region(disc(3), "drawn")], "The annotation was edited since."),
        ([leftover("a"), leftover("b"), region(disc(18), "mask-a")], "The annotation has the mask."),
        (None, "The annotation was deleted."),
    ],
)
def test_what_changed_since_is_not_touched(engine, table, now, reason):
    submit(engine, [leftover("a"), leftover("b")])
    studio = Studio(now)
    recover_due(engine, studio)
    assert (studio.writes, studio.result) == (0, now)
    (row,) = table("recoveries")
    assert (row["status"], row["reason"]) == ("skipped", reason)


@pytest.mark.parametrize(
    ("result", "more"),
    [
        ([leftover("a"), leftover("b"), region(disc(18), "mask-a")], {}),
        ([OTHER], {}),
        ([leftover("unknown")], {}),
        ([leftover("a"), leftover("b")], {"was_cancelled": True}),
    ],
    ids=["floating tick", "rejected", "another's prompts", "skipped task"],
)
def test_nothing_is_asked_where_nothing_was_lost(engine, table, result, more):
    submit(engine, result, **more)
    assert table("recoveries") == []


def test_an_object_without_a_mask_has_nothing_to_put_back(engine, table):
    failed = answer(PROMPTS[:1], error="No answer within 90 s.")
    apply(engine, [answer_event(failed), webhook_event(webhook([leftover("a")]))])
    studio = Studio([leftover("a")])
    recover_due(engine, studio)
    assert (studio.writes, table("recoveries")[0]["status"]) == (0, "skipped")


def test_a_studio_that_does_not_answer_is_asked_again(engine, table):
    result = [leftover("a"), leftover("b")]
    submit(engine, result)
    studio = Studio(result)
    studio.down = 2
    for attempt in (1, 2, 3):
        recover_due(engine, studio)
        assert table("recoveries")[0]["attempts"] == attempt
        recover_due(engine, studio)  # not due yet
        with engine.begin() as connection:
            connection.execute(update(recoveries).values(due=0))
    assert (studio.writes, table("recoveries")[0]["status"]) == (1, "restored")


def test_a_clock_that_was_set_back_puts_nothing_off(engine, table):
    result = [leftover("a"), leftover("b")]
    submit(engine, result)
    with engine.begin() as connection:
        connection.execute(update(recoveries).values(due=time.time() + 86_400))
    studio = Studio(result)
    recover_due(engine, studio)
    assert (studio.writes, table("recoveries")[0]["status"]) == (1, "restored")


def test_it_gives_up_in_the_end(engine, table):
    submit(engine, [leftover("a"), leftover("b")])
    studio = Studio([])
    studio.down = 99
    for _ in range(len(recovery.RETRY_AFTER_S) + 3):
        recover_due(engine, studio)
        with engine.begin() as connection:
            connection.execute(update(recoveries).values(due=0))
    (row,) = table("recoveries")
    assert (row["status"], row["attempts"], row["reason"]) == ("failed", len(recovery.RETRY_AFTER_S) + 1, "no answer")


def test_the_log_wakes_its_recovery(data_dir):
    result = [leftover("a"), leftover("b")]
    studio = Studio(result)
    log = ClickLog(data_dir=data_dir, recover=lambda engine: Recovery(engine, studio))
    log.answered(answer(PROMPTS[:1], disc(10)))
    log.answered(answer(PROMPTS, disc(18)))
    log.webhook(webhook(result))
    for _ in range(400):
        if studio.writes:
            break
        time.sleep(0.05)
    log.close()
    assert studio.result == [region(disc(18), "mask-a")]
