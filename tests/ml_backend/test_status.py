from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from playwright.sync_api import Browser

from ml_backend.app import create_app
from ml_backend.settings import Settings
from ml_backend.status import in_bytes, in_words
from tests.ml_backend.conftest import FakeRunner

DOCS = Path(__file__).parents[2] / "docs"
#: What a worker of each kind says, in both runners' form.
SAID = {
    "runner": "rq",
    "queues": {"interactive": 2, "embed": 0, "batch": 12, "train": 0},
    "workers": [
        {
            "name": "gpu-1-100-aa",
            "state": "ready",
            "queues": ["interactive", "embed"],
            "job": "segment-1-2-3",
            "age_s": 0.4,
            "facts": {
                "host": "gpu-1",
                "pid": 100,
                "memory": 1_900_000_000,
                "device": "cuda",
                "device_memory": 4_100_000_000,
                "device_memory_total": 80_000_000_000,
                "backbone": "vit_b-0123456789ab",
                "caches": {
                    "embeddings": {
                        "bytes": 300_000_000,
                        "max_bytes": 469_762_048,
                        "entries": 71,
                        "hits": 90,
                        "misses": 10,
                    },
                    "logits": {"bytes": 1_000_000, "max_bytes": 67_108_864, "entries": 12, "hits": 5, "misses": 0},
                },
                "versions": {"python": "3.11.7"},
            },
        },
        {
            "name": "gpu-2-7-bb",
            "state": "failed",
            "queues": ["interactive"],
            "reason": "The head is damaged.",
            "facts": {},
        },
    ],
    "running": [{"job": "segment-1-2-3", "worker": "gpu-1-100-aa", "age_s": 0.4}],
    "jobs": {
        "interactive": {
            "oldest_s": 7.5,
            "done": {"count": 1234, "age_s": 0.2, "said": ""},
            "refused": {"count": 3, "age_s": 4000.0, "said": "No."},
            "failed": {"count": 1, "age_s": 90_000.0, "said": "KeyError"},
        },
    },
}


@pytest.fixture
def app(settings: Settings, runner: FakeRunner) -> Flask:
    runner.status = lambda: json.loads(json.dumps(SAID))  # type: ignore[method-assign]
    return create_app(settings, runner)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def test_scripts_get_json_and_browsers_a_page(client: FlaskClient) -> None:
    said = client.get("/status").get_json()
    assert said["queues"][0] == {
        "name": "interactive",
        "waiting": 2,
        "running": 1,
        **SAID["jobs"]["interactive"],  # type: ignore[index]
    }
    assert said["queues"][2]["done"] == {"count": 0}
    assert [worker["state"] for worker in said["workers"]] == ["ready", "failed"]
    assert said["click_log"]["database_up"] is True
    page = client.get("/status", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.content_type.startswith("text/html")
    assert "The head is damaged." in page.text
    assert client.get("/status?format=json", headers={"Accept": "text/html"}).get_json()["name"] == "bald-sam"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_what_is_wrong_is_said_in_words(client: FlaskClient, runner: FakeRunner) -> None:
    problems = client.get("/status").get_json()["problems"]
    assert any("The head is damaged." in problem for problem in problems)
    assert any("A click waits for 7.5 s" in problem for problem in problems)
    assert any("queue batch" in problem for problem in problems)
    runner.status = lambda: {
        "runner": "rq",
        "error": "Redis cannot be reached.",
        "queues": {},
        "workers": [],
        "jobs": {},
    }  # type: ignore[method-assign]
    assert client.get("/status").get_json()["problems"] == ["Redis cannot be reached."]
    runner.status = lambda: {"runner": "rq", "queues": {"interactive": 0}, "workers": []}  # type: ignore[method-assign]
    assert "bald-sam worker" in client.get("/status").get_json()["problems"][0]

    def broken() -> dict[str, Any]:
        raise ConnectionError("with a secret")

    runner.status = broken  # type: ignore[method-assign]
    for route in ("/status", "/status?format=html", "/metrics"):
        answer = client.get(route)
        assert answer.status_code == 200
        assert "secret" not in answer.text


def test_refused_requests_are_remembered_and_cannot_break_the_page(client: FlaskClient, capture: Any) -> None:
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    body["tasks"][0]["data"] = {}
    body["label_config"] = (
        body["label_config"].replace("$image", "$x<script>alert(1)</script>").replace("<script>", "&lt;script>")
    )
    for _ in range(50):
        client.post("/predict", json=body)
    recent = client.get("/status").get_json()["recent"]
    assert len(recent) == 30
    assert recent[0]["route"] == "/predict"
    assert recent[0]["status"] >= 400
    assert "<script>" not in client.get("/status?format=html").text


def test_a_page_elsewhere_may_not_send(client: FlaskClient, capture: Any) -> None:
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    for origin in ("http://evil.example", "null", "http://localhost"):
        assert client.post("/predict", json=body, headers={"Origin": origin}).status_code == 403
    assert client.post("/predict", json=body).status_code == 200


def test_every_route_but_health_wants_credentials(settings: Settings, runner: FakeRunner) -> None:
    locked = create_app(settings.model_copy(update={"token": Settings(token="t0ken-of-ours").token}), runner)
    client = locked.test_client()
    rules = [rule for rule in locked.url_map.iter_rules() if rule.rule != "/health"]
    assert {"/status", "/metrics", "/report", "/predict"} <= {rule.rule for rule in rules}
    for rule in rules:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"):
            answer = client.open(rule.rule, method=method)
            assert answer.status_code == 401, (rule.rule, method)
            assert "bald-sam" not in answer.text.replace("Credentials", "")
    assert client.get("/health").status_code == 200
    assert client.get("/status", headers={"Authorization": "Bearer t0ken-of-ours"}).status_code == 200


def samples(text: str) -> set[str]:
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}


def test_metrics_tell_what_the_status_tells(client: FlaskClient, capture: Any) -> None:
    client.post("/predict", json=capture("predict_interactive_plain_keypoint_3_prompts"))
    text = client.get("/metrics").text
    for line in (
        'bald_sam_queue_waiting{queue="batch"} 12.0',
        'bald_sam_queue_oldest_seconds{queue="interactive"} 7.5',
        'bald_sam_jobs_total{outcome="done",queue="interactive"} 1234.0',
        'bald_sam_workers{state="failed"} 1.0',
        'bald_sam_cache_lookups_total{cache="embeddings",result="hit",worker="gpu-1-100-aa"} 90.0',
        "bald_sam_click_log_database_up 1.0",
    ):
        ordered = re.sub(r"\{(.*)\}", lambda m: "{" + ",".join(sorted(m[1].split(","))) + "}", line)
        lines = {
            re.sub(r"\{(.*)\}", lambda m: "{" + ",".join(sorted(m[1].split(","))) + "}", one)
            for one in text.splitlines()
        }
        assert ordered in lines
    assert "process_resident_memory_bytes" in samples(text)


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-alerts.yml"])
def test_dashboard_and_alerts_name_only_metrics_that_exist(client: FlaskClient, capture: Any, name: str) -> None:
    client.post("/predict", json=capture("predict_interactive_plain_keypoint_3_prompts"))
    client.post("/webhook", json=capture("webhook_ANNOTATION_CREATED"))
    there = samples(client.get("/metrics").text)
    content = (DOCS / "monitoring" / name).read_text()
    named = set(re.findall(r"\b(?:bald_sam|process)_[a-z_]+", content))
    assert len(named) > 4
    assert named <= there, named - there


def test_the_dashboard_is_one() -> None:
    board = json.loads((DOCS / "monitoring" / "grafana-dashboard.json").read_text())
    assert board["schemaVersion"] >= 39
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {"x", "y", "w", "h"} == set(panel["gridPos"])
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_the_page_in_a_browser(client: FlaskClient, browser: Browser, tmp_path: Path) -> None:
    html = client.get("/status?format=html").text
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme=scheme)  # type: ignore[arg-type]
        page.set_content(html)
        assert page.get_by_role("alert").is_visible()
        assert page.locator(".queue").count() == 4
        assert page.locator("text=gpu-1-100-aa").is_visible()
        wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert not wide
        page.screenshot(path=str(tmp_path / f"status-{scheme}.png"), full_page=True)
        page.close()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "–"), (0.44, "0.4 s"), (12, "12 s"), (119, "119 s"), (180, "3 min"), (7200, "2 h"), (200_000, "2 days")],
)
def test_times_in_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


def test_bytes_in_words() -> None:
    assert [in_bytes(count) for count in (None, 12_345_678, 3_400_000_000)] == ["–", "12 MB", "3.4 GB"]


def test_credentials_show_nowhere(settings: Settings, runner: FakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    secrets = ["pa55word-of-ours", "t0ken-of-ours", "redis-pa55word", "api-key-of-ours", "clicks-pa55word"]
    held = Settings(
        data_dir=settings.data_dir,
        basic_auth_user="ls",
        basic_auth_pass=secrets[0],
        token=secrets[1],
        redis_url=f"redis://:{secrets[2]}@127.0.0.1:1/0",
        label_studio_api_key=secrets[3],
        clicks_url=f"sqlite:///{settings.data_dir}/{secrets[4]}.sqlite",
    )
    client = create_app(held, runner).test_client()
    pair = base64.b64encode(f"ls:{secrets[0]}".encode()).decode()
    caplog.set_level("DEBUG")
    for route in ("/status", "/status?format=html", "/metrics", "/", "/health", "/versions", "/report", "/nowhere"):
        for value in (f"Basic {pair}", f"Bearer {secrets[1]}", f"Bearer {secrets[1]}x"):
            answer = client.get(route, headers={"Authorization": value})
            shown = answer.text + str(answer.headers)
            assert not [secret for secret in (*secrets, pair) if secret in shown]
    shown = caplog.text + repr(held) + str(held.runtime_options()) + held.model_dump_json()
    assert not [secret for secret in (*secrets, pair) if secret in shown]
