"""The click log behind the server: what a request leaves in it, who sees proposals, and the report's address."""

from __future__ import annotations

import copy
import sqlite3
import time
from typing import Any

import pytest
from pydantic import SecretStr

from ml_backend.jobs.failures import JobFailed
from tests.ml_backend.clicks.conftest import webhook

THREE = "predict_interactive_plain_keypoint_3_prompts"


def rows(log, name: str) -> list[dict[str, Any]]:
    assert log.flush()
    with sqlite3.connect(log.engine.url.database) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {name} ORDER BY id")]


def prompts(body: dict[str, Any], count: int) -> dict[str, Any]:
    """The request when only the first prompts had been given."""
    body = copy.deepcopy(body)
    body["params"]["context"]["result"] = body["params"]["context"]["result"][:count]
    return body


def test_clicks_of_a_captured_object(served, capture):
    client, log = served()
    body = capture(THREE)
    for count in (1, 2, 3):
        assert client.post("/predict", json=prompts(body, count)).status_code == 200
    clicks, (thing,) = rows(log, "clicks"), rows(log, "objects")
    assert [(row["kind"], row["click"], row["prompt"], row["positive"]) for row in clicks] == [
        ("placed", 1, "1WKhcpj497", 1),
        ("placed", 2, "1J06TpT_ds", 1),
        ("placed", 3, "07C399X5bO", 0),
    ]
    assert (clicks[0]["x"], clicks[0]["y"]) == pytest.approx((34.984520123839005 * 18, 45.04643962848297 * 12))
    assert (thing["session"], thing["width"], thing["height"]) == ("11:25:1WKhcpj497", 1800, 1200)
    assert (thing["image"], thing["arm"], thing["arm_unit"]) == (
        "/data/upload/11/e03dadfc-truck.jpg",
        "show",
        "project",
    )
    assert [row["radius_px"] for row in rows(log, "answers")] == [pytest.approx(0.008 * 1800)] * 3
    assert clicks[1]["proposal_shown"] == 1
    assert all(row["answer_ms"] > 0 for row in clicks)


def test_the_hidden_arm_computes_logs_and_does_not_send(served, capture, runner):
    client, log = served(arms="show,11=hide")
    body = capture(THREE)
    answers = [client.post("/predict", json=prompts(body, count)).json["results"][0]["result"] for count in (1, 2)]
    assert [[region["type"] for region in answer] for answer in answers] == [["brushlabels"]] * 2
    assert all(job.propose for job in runner.jobs)
    second = rows(log, "clicks")[1]
    assert (second["proposal_x"], second["proposal_y"], second["proposal_shown"]) == (450, 600, 0)


def test_a_refused_click_is_logged_with_its_reason(served, capture, runner):
    client, log = served()
    runner.error = JobFailed("Too many clicks are waiting.", "Click again in a moment.", 503)
    assert client.post("/predict", json=prompts(capture(THREE), 1)).status_code == 503
    assert [row["error"] for row in rows(log, "answers")] == ["Too many clicks are waiting. Click again in a moment."]


def test_opening_a_task_and_other_events_leave_nothing(served, capture):
    client, log = served()
    assert client.post("/predict", json=capture("predict_batch")).status_code == 200
    assert client.post("/webhook", json=capture("webhook_TASKS_CREATED")).status_code == 201
    assert (log.counts.taken, log._threads) == (0, [])


def test_switched_off(served, capture):
    client, log = served(click_log=False)
    assert log is None
    assert client.post("/predict", json=capture(THREE)).status_code == 200
    assert client.post("/webhook", json=webhook([])).status_code == 201
    assert client.get("/report").status_code == 404


def test_the_report_wants_credentials_and_says_what_it_cannot_read(served, capture):
    from pydantic import SecretStr

    client, log = served(token=SecretStr("secret"))
    assert client.get("/report").status_code == 401
    known = {"Authorization": "Bearer secret"}
    empty = client.get("/report", headers=known)
    assert (empty.status_code, empty.content_type) == (200, "text/html; charset=utf-8")
    assert "Nothing here yet" in empty.text
    client.post("/predict", json=capture(THREE), headers=known)
    assert log.flush()
    assert "Nothing here yet" not in client.get("/report?project=11&since=2020-01-01", headers=known).text
    assert "Nothing here yet" in client.get("/report?project=12", headers=known).text
    for query in ("project=x", "since=yesterday", "project=999999999999999999999999"):
        refused = client.get(f"/report?{query}", headers=known)
        assert (refused.status_code, refused.json["error"][:30]) == (422, "The report cannot be chosen so")


def test_a_database_that_is_away_is_no_failed_answer(served, capture):
    client, log = served(clicks_url=SecretStr("sqlite:////no/such/folder/clicks.sqlite"))
    assert client.post("/predict", json=capture(THREE)).status_code == 200
    time.sleep(0.5)
    assert client.get("/report").status_code == 503
    assert log.counts.dropped == 0
