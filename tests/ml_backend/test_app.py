from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ml_backend.app import create_app
from ml_backend.labeling_config import recommended_config
from ml_backend.settings import Settings


@pytest.fixture
def client(settings: Settings, runner: Any) -> FlaskClient:
    return create_app(settings, runner).test_client()


def body_with(context: Any, capture: Any) -> dict[str, Any]:
    body: dict[str, Any] = capture("predict_interactive_plain_keypoint_3_prompts")
    body["params"]["context"] = context
    return body


def refused(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status
    content: dict[str, Any] = answer.get_json()
    assert set(content) == {"error", "hint", "id"}
    assert all(content.values())
    assert "Traceback" not in answer.text
    return content


@pytest.mark.parametrize(
    "name", ["predict_interactive_plain_keypoint_3_prompts", "predict_interactive_keypointlabels_1st_click"]
)
def test_a_captured_click_gets_mask_and_ring(client: FlaskClient, runner: Any, capture: Any, name: str) -> None:
    body = capture(name)
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200
    (prediction,) = answer.get_json()["results"]
    mask, ring = prediction["result"]
    assert (mask["type"], mask["score"]) == ("brushlabels", 0.875)
    assert (ring["from_name"], ring["dynamic"], ring["score"]) == ("next", True, 0.25)
    assert prediction["model_version"] == "tiny-0123456789ab"
    (job,) = runner.jobs
    assert job.image.url == body["tasks"][0]["data"]["image"]
    assert (job.image.task, job.image.project) == (body["tasks"][0]["id"], body["tasks"][0]["project"])
    assert (job.width, job.height, job.session) == (1800, 1200, mask["id"])
    assert len(job.prompts.clicks) == len(body["params"]["context"]["result"])


def test_a_captured_rectangle(client: FlaskClient, runner: Any, capture: Any) -> None:
    body = body_with(capture("predict_interactive_rectangle")["context"], capture)
    assert len(client.post("/predict", json=body).get_json()["results"][0]["result"]) == 2
    assert runner.jobs[0].prompts.box is not None


def test_ids_hold_within_an_object_and_over_a_restart(settings: Settings, runner: Any, capture: Any) -> None:
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    prompts = body["params"]["context"]["result"]
    ids = []
    for count in (1, 2, 3):
        client = create_app(settings, runner).test_client()
        body["params"]["context"]["result"] = prompts[:count]
        ids.append([r["id"] for r in client.post("/predict", json=body).get_json()["results"][0]["result"]])
    assert len({mask for mask, _ in ids}) == 1
    assert len({ring for _, ring in ids}) == 3
    body["params"]["context"]["result"] = prompts[1:]
    assert client.post("/predict", json=body).get_json()["results"][0]["result"][0]["id"] != ids[0][0]


def test_no_ring_once_stopped(client: FlaskClient, runner: Any, capture: Any) -> None:
    runner.stopped = "nothing left to ask"
    answer = client.post("/predict", json=capture("predict_interactive_plain_keypoint_3_prompts"))
    assert [r["type"] for r in answer.get_json()["results"][0]["result"]] == ["brushlabels"]


def test_opening_a_task_encodes_its_image(client: FlaskClient, runner: Any, capture: Any) -> None:
    answer = client.post("/predict", json=capture("predict_batch"))
    assert answer.status_code == 200
    assert answer.get_json()["results"] == [[]]
    assert [image.url for image in runner.embedded[0].images] == ["/data/upload/1/3c89c0ff-truck.jpg"]
    assert runner.jobs == []


def test_a_batch_gets_one_empty_answer_each(client: FlaskClient, runner: Any, capture: Any, settings: Settings) -> None:
    body = capture("predict_batch")
    body["tasks"] = [body["tasks"][0] | {"id": n} for n in range(40)]
    # No worker for the batch: every task is answered all the same, and what is owed comes later.
    assert client.post("/predict", json=body).get_json()["results"] == [[]] * 40
    assert len(runner.embedded[0].images) == 1 + settings.prefetch


def test_a_runner_that_cannot_encode_ahead_fails_no_request(client: FlaskClient, runner: Any, capture: Any) -> None:
    def fail(_: Any) -> None:
        raise ConnectionError("queue away")

    runner.embed = fail
    assert client.post("/predict", json=capture("predict_batch")).status_code == 200


@pytest.mark.parametrize(
    "context",
    [
        {"result": []},
        {"result": [{"from_name": "brush", "type": "brushlabels", "value": {}}]},
        {"result": [{"from_name": "kp", "to_name": "image", "type": "keypoint", "id": "old"}]},
    ],
)
def test_nothing_prompted_is_answered_with_nothing(
    client: FlaskClient, runner: Any, capture: Any, context: Any
) -> None:
    answer = client.post("/predict", json=body_with(context, capture))
    assert answer.status_code == 200
    assert [r["result"] for r in answer.get_json()["results"]] == [[]]
    assert runner.jobs == []
    assert runner.embedded == []


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("tasks", [], 422),
        ("tasks", None, 422),
        ("tasks", "text", 422),
        ("tasks", [1], 422),
        ("tasks", [{"data": {"image": "a.jpg"}}], 422),
        ("tasks", [{"id": 1, "data": {"image": "a.jpg"}}, {"data": {"image": "b.jpg"}}], 422),
        ("tasks", [{"id": 1, "data": {"image": "a.jpg"}}, {"id": "b", "data": {"image": "b.jpg"}}], 422),
        ("tasks", [{"id": 1, "data": {}}], 422),
        ("tasks", [{"id": 1, "data": {"image": 5}}], 422),
        ("label_config", None, 422),
        ("label_config", {"a": 1}, 400),
        ("label_config", "<View", 400),
        ("label_config", '<View><Image name="image" value="$image"/></View>', 400),
        ("params", "text", 422),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(
    client: FlaskClient, capture: Any, field: str, value: Any, status: int
) -> None:
    good = capture("predict_interactive_plain_keypoint_3_prompts")
    refused(client.post("/predict", json=good | {field: value}), status)
    assert client.post("/predict", json=good).status_code == 200


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a":' + b"1" * 5000 + b"}"])
def test_bad_json(client: FlaskClient, data: bytes) -> None:
    for route in ("/predict", "/setup", "/webhook"):
        refused(client.post(route, data=data), 400)


def test_a_failed_job_speaks_for_itself(
    client: FlaskClient, runner: Any, capture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class JobFailed(Exception):
        error = "The image cannot be fetched."
        hint = "Check its address.\r\nX-Evil: ä"
        status = 503

    runner.error = JobFailed()
    body = capture("predict_interactive_plain_keypoint_3_prompts")
    answer = client.post("/predict", json=body)
    content = refused(answer, 503)
    assert answer.headers["Retry-After"]
    assert answer.status == "503 The image cannot be fetched. Check its address. X-Evil:"
    assert content["id"] == answer.headers["X-Request-Id"]
    assert content["id"] in caplog.text
    runner.error = None
    assert client.post("/predict", json=body).status_code == 200


def test_a_fault_stays_inside(client: FlaskClient, runner: Any, capture: Any, caplog: pytest.LogCaptureFixture) -> None:
    runner.error = KeyError("secret detail")
    content = refused(client.post("/predict", json=capture("predict_interactive_plain_keypoint_3_prompts")), 500)
    assert "secret detail" not in json.dumps(content)
    assert "secret detail" in caplog.text
    assert content["id"] in caplog.text


def test_too_large(settings: Settings, runner: Any, capture: Any) -> None:
    client = create_app(settings.model_copy(update={"max_request_mb": 1}), runner).test_client()
    refused(client.post("/predict", data=b"x" * 1_100_000), 413)
    small = create_app(settings.model_copy(update={"max_image_megapixels": 2}), runner).test_client()
    refused(small.post("/predict", json=capture("predict_interactive_plain_keypoint_3_prompts")), 413)


def test_wrong_routes(client: FlaskClient) -> None:
    refused(client.get("/nowhere"), 404)
    refused(client.get("/predict"), 405)


def test_setup_says_what_is_missing_where_label_studio_shows_it(client: FlaskClient, capture: Any) -> None:
    good = client.post("/setup", json=capture("setup"))
    assert good.status_code == 200
    assert good.get_json()["model_version"] == "bald-sam-tiny"
    body = capture("setup")
    body["schema"] = '<View><Image name="image" value="$image"/></View>'
    answer = client.post("/setup", json=body)
    refused(answer, 400)
    assert "<BrushLabels" in answer.status
    body["schema"] = recommended_config(["A"])
    assert client.post("/setup", json=body).get_json()["warnings"] == []


@pytest.mark.parametrize(
    "name",
    [
        "ANNOTATION_CREATED",
        "ANNOTATION_UPDATED",
        "ANNOTATIONS_DELETED",
        "PROJECT_UPDATED",
        "START_TRAINING",
        "TASKS_CREATED",
        "TASKS_DELETED",
    ],
)
def test_webhooks(client: FlaskClient, capture: Any, name: str) -> None:
    assert client.post("/webhook", json=capture(f"webhook_{name}")).status_code == 201
    assert f'bald_sam_events_total{{action="{name}"}} 1.0' in client.get("/metrics").text


def test_small_routes(client: FlaskClient, capture: Any, runner: Any) -> None:
    health = client.get("/health").get_json()
    assert (health["status"], health["model_class"], health["ready"]) == ("UP", "BaldSamBackend", True)
    assert client.get("/versions").get_json() == {"versions": ["bald-sam-tiny"]}
    assert "/predict" in client.get("/").get_json()["routes"]
    client.post("/predict", json=capture("predict_interactive_plain_keypoint_3_prompts"))
    metrics = client.get("/metrics").text
    assert 'bald_sam_requests_total{route="/predict",status="200"} 1.0' in metrics
    assert 'bald_sam_stage_seconds_sum{stage="decode"} 0.012' in metrics

    def fail() -> dict[str, Any]:
        raise ConnectionError

    runner.status = fail
    assert client.get("/health").get_json()["ready"] is False


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_credentials(settings: Settings, runner: Any) -> None:
    locked = Settings(
        _env_file=None, data_dir=settings.data_dir, basic_auth_user="ls", basic_auth_pass="p\u00e4ss", token="t0ken"
    )
    client = create_app(locked, runner).test_client()
    assert client.get("/health").status_code == 200
    for route in ("/", "/versions", "/metrics"):
        wrong = [basic("ls", "wrong"), basic("", ""), "Bearer wrong", "Bearer ", "Basic %%%", "t0ken"]
        for header in [{}, *({"Authorization": value} for value in wrong)]:
            refused(client.get(route, headers=header), 401)
        for value in (basic("ls", "p\u00e4ss"), "Bearer t0ken"):
            assert client.get(route, headers={"Authorization": value}).status_code == 200
    for route in ("/predict", "/setup", "/webhook"):
        assert client.post(route, json={}).headers["WWW-Authenticate"].startswith("Basic")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@hypothesis_settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_mutated_body_is_a_fault(client: FlaskClient, capture: Any, data: st.DataObject) -> None:
    route, name = data.draw(
        st.sampled_from(
            [
                ("/predict", "predict_interactive_plain_keypoint_3_prompts"),
                ("/predict", "predict_interactive_keypointlabels_1st_click"),
                ("/predict", "predict_batch"),
                ("/setup", "setup"),
                ("/webhook", "webhook_START_TRAINING"),
            ]
        )
    )
    body = copy.deepcopy(capture(name))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(body)[1:] or [()]))
        if not path:
            break
        target = body
        for key in path[:-1]:
            target = target[key]
        if isinstance(target, dict) and data.draw(st.booleans()):
            del target[path[-1]]
        else:
            target[path[-1]] = data.draw(json_values)
    answer = client.post(route, data=json.dumps(body))
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        refused(answer, answer.status_code)
