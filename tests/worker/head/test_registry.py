from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from worker.contract import HEADS_IN_USE_KEY, HeadsInUse
from worker.head.registry import HeadRegistry, digest


def make(registry: HeadRegistry, name: str, content: bytes = b"numbers") -> str:
    """The files of a head; the registry never looks into the numbers."""
    folder = registry.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "head.json").write_text(json.dumps({"backbone": "tiny-1", "notes": {"of": name}}))
    (folder / "head.safetensors").write_bytes(content + name.encode())
    return name


@pytest.fixture
def registry(tmp_path: Path) -> HeadRegistry:
    return HeadRegistry(tmp_path)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


def test_nothing_was_chosen(registry: HeadRegistry) -> None:
    assert registry.in_use().of(3).head is None
    assert registry.names() == []
    with pytest.raises(ValueError, match="no earlier head"):
        registry.rollback(3)


def test_a_project_has_its_own_head_and_others_the_default(registry: HeadRegistry) -> None:
    for name in ("all", "three"):
        make(registry, name)
    registry.use("all")
    registry.use("three", 3)
    in_use = registry.in_use()
    assert (in_use.of(3).head, in_use.of(4).head, in_use.of(None).head) == ("three", "all", "all")
    assert in_use.of(3).backbone == "tiny-1"
    assert in_use.of(3).digest == digest(registry.path("three"))
    registry.use(None, 3)
    assert registry.in_use().of(3).head is None


def test_going_back_is_pinned_and_ends_where_the_project_began(registry: HeadRegistry) -> None:
    for name in ("all", "a", "b"):
        make(registry, name)
    registry.use("all")
    registry.use("a", 3)
    registry.use("b", 3)
    registry.use("b", 3)  # once more is no step
    assert registry.rollback(3).head == "a"
    assert registry.in_use().of(3).pinned
    assert registry.rollback(3).head == "all"
    with pytest.raises(ValueError, match="no earlier head"):
        registry.rollback(3)
    assert not registry.use("b", 3).pinned


def test_pinning_keeps_the_head_in_use(registry: HeadRegistry) -> None:
    make(registry, "all")
    registry.use("all")
    assert registry.pin(3).head == "all"
    assert registry.in_use().of(3).pinned and not registry.in_use().of(4).pinned
    assert not registry.pin(3, pinned=False).pinned


def test_versions_count_up(registry: HeadRegistry) -> None:
    assert [registry.new_name("project-3") for _ in range(3)] == ["project-3-v1", "project-3-v2", "project-3-v3"]
    assert registry.new_name("project-31") == "project-31-v1"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: HeadRegistry(registry.folder.parent).new_name("x"), range(16)))
    assert len(set(made)) == 16


@pytest.mark.parametrize("name", ["", "..", "../a", "a/b", ".hidden", "x" * 101])
def test_names_stay_in_the_folder(registry: HeadRegistry, name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a head"):
        registry.path(name)


def test_a_missing_head_cannot_be_used(registry: HeadRegistry) -> None:
    with pytest.raises(ValueError, match="no head gone"):
        registry.use("gone")
    assert registry.in_use() == HeadsInUse()


def test_a_damaged_choice_keeps_the_heads_of_before(registry: HeadRegistry, caplog: pytest.LogCaptureFixture) -> None:
    registry.use(make(registry, "a"))
    assert registry.in_use().of(None).head == "a"
    file = registry.folder / "in-use.json"
    file.write_text("{")
    os.utime(file, (1, 1))
    assert registry.in_use().of(None).head == "a"
    assert "cannot be read" in caplog.text


def test_another_process_sees_the_change_in_the_folder(registry: HeadRegistry) -> None:
    other = HeadRegistry(registry.folder.parent)
    assert other.in_use().of(3).head is None
    registry.use(make(registry, "a"), 3)
    assert other.in_use().of(3).head == "a"


def test_workers_on_other_machines_get_heads_through_redis(tmp_path: Path, client: redis.Redis) -> None:
    here, there = HeadRegistry(tmp_path / "here", client), HeadRegistry(tmp_path / "there", client)
    here.use(make(here, "a"), 3)
    assert there.in_use(fresh=True).of(3).head == "a"
    assert there.path("a").read_bytes() == here.path("a").read_bytes()
    assert there.describe("a")["notes"] == {"of": "a"}
    there.rollback(3)
    assert here.in_use(fresh=True).of(3).head is None
    here.publish(make(here, "never-used"))
    assert set(there.names()) == {"a", "never-used"}


def test_a_head_that_was_made_anew_is_fetched_anew(tmp_path: Path, client: redis.Redis) -> None:
    here, there = HeadRegistry(tmp_path / "here", client), HeadRegistry(tmp_path / "there", client)
    here.use(make(here, "a"))
    assert there.in_use(fresh=True).of(None).head == "a"
    here.use(make(here, "a", b"others"))
    there.in_use(fresh=True)
    assert there.path("a").read_bytes() == b"othersa"


def test_a_redis_that_forgot_is_filled_again(tmp_path: Path, client: redis.Redis) -> None:
    here, there = HeadRegistry(tmp_path / "here", client), HeadRegistry(tmp_path / "there", client)
    here.use(make(here, "a"), 3)
    client.flushall()
    assert here.in_use(fresh=True).of(3).head == "a"
    assert there.in_use(fresh=True).of(3).head == "a"
    assert there.path("a").is_file()


def test_a_redis_that_is_away_changes_nothing(tmp_path: Path, client: redis.Redis) -> None:
    HeadRegistry(tmp_path, client).use(make(HeadRegistry(tmp_path), "a"))
    with redis.Redis(port=1, socket_connect_timeout=0.2) as nobody:
        assert HeadRegistry(tmp_path, nobody).in_use().of(None).head == "a"


def test_rubbish_in_redis_is_replaced(tmp_path: Path, client: redis.Redis) -> None:
    here = HeadRegistry(tmp_path, client)
    here.use(make(here, "a"))
    client.set(HEADS_IN_USE_KEY, b"\xff{")
    assert here.in_use(fresh=True).of(None).head == "a"
    assert HeadsInUse.model_validate_json(client.get(HEADS_IN_USE_KEY)).of(None).head == "a"  # type: ignore[arg-type]


def test_changes_from_two_machines_add_up(tmp_path: Path, client: redis.Redis) -> None:
    registries = [HeadRegistry(tmp_path / str(number), client) for number in range(4)]
    for number, one in enumerate(registries):
        make(one, f"head-{number}")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: registries[n % 4].use(f"head-{n % 4}", n), range(12)))
    for one in registries:
        in_use = one.in_use(fresh=True)
        assert in_use.revision == 12
        assert [in_use.of(n).head for n in range(12)] == [f"head-{n % 4}" for n in range(12)]
