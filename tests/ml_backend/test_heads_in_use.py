from __future__ import annotations

import redis

from ml_backend.app import create_app
from ml_backend.heads_in_use import HeadsReader, model_version, model_versions
from ml_backend.labeling_config import recommended_config
from ml_backend.settings import Settings
from tests.ml_backend.conftest import FakeRunner
from tests.worker.head.test_registry import make
from worker.head.registry import HeadRegistry


def test_the_version_follows_the_head_without_a_restart(settings: Settings) -> None:
    registry = HeadRegistry(settings.data_dir)
    assert model_version(settings, 3) == "bald-sam-tiny"
    registry.use(make(registry, "project-3-v1"), 3)
    assert model_version(settings, 3) == "bald-sam-tiny-project-3-v1"
    assert model_version(settings, 4) == model_version(settings) == "bald-sam-tiny"
    registry.use(make(registry, "project-3-v2"), 3)
    assert model_versions(settings) == ["bald-sam-tiny", "bald-sam-tiny-project-3-v2"]
    registry.rollback(3)
    assert model_version(settings, 3) == "bald-sam-tiny-project-3-v1"


def test_a_head_of_another_backbone_is_not_shown(settings: Settings) -> None:
    registry = HeadRegistry(settings.data_dir)
    registry.use(make(registry, "a"))
    assert model_version(settings.model_copy(update={"backbone": "vit_b"})) == "bald-sam-vit_b"
    assert model_version(settings.model_copy(update={"head": "/x/mine.safetensors"})) == "bald-sam-tiny-mine"


def test_label_studio_is_told(settings: Settings, runner: FakeRunner) -> None:
    registry = HeadRegistry(settings.data_dir)
    client = create_app(settings, runner).test_client()
    body = {"project": "3.1795354867", "schema": recommended_config(["Object"])}
    assert client.post("/setup", json=body).get_json()["model_version"] == "bald-sam-tiny"
    registry.use(make(registry, "project-3-v1"), 3)
    assert client.post("/setup", json=body).get_json()["model_version"] == "bald-sam-tiny-project-3-v1"
    assert client.get("/versions").get_json()["versions"] == ["bald-sam-tiny", "bald-sam-tiny-project-3-v1"]
    asked = {"tasks": [{"id": 1, "data": {"image": "a.png"}}], "label_config": body["schema"], "project": "3.1"}
    answered = client.post("/predict", json=asked | {"params": {"context": {"result": []}}}).get_json()["results"][0]
    assert answered["model_version"] == "bald-sam-tiny-project-3-v1"


def test_with_redis_the_heads_of_other_machines_count(settings: Settings, redis_url: str) -> None:
    elsewhere = settings.data_dir / "elsewhere"
    with redis.Redis.from_url(redis_url) as client:
        registry = HeadRegistry(elsewhere, client)
        registry.use(make(registry, "a"), 3)
    here = Settings(_env_file=None, data_dir=settings.data_dir, redis_url=redis_url)
    assert HeadsReader(here).in_use().of(3).head == "a"


def test_a_redis_that_is_away_delays_nothing(settings: Settings) -> None:
    away = HeadsReader(Settings(_env_file=None, data_dir=settings.data_dir, redis_url="redis://127.0.0.1:1"))
    assert away.in_use().of(3).head is None
    assert away._again > 0
