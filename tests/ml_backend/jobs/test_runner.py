from __future__ import annotations

from ml_backend.jobs import make_runner
from ml_backend.jobs.runner import in_chunks
from ml_backend.settings import Settings
from worker.contract import ImageRef, PrelabelItem


def test_settings_choose_the_runner(redis_url: str) -> None:
    embedded = make_runner(Settings())
    assert embedded.status()["runner"] == "in-process"
    embedded.close()
    remote = make_runner(Settings.model_validate({"redis_url": redis_url}))
    status = remote.status()
    assert (status["runner"], status["workers"], status["running"]) == ("rq", [], [])
    assert status["queues"] == {"interactive": 0, "embed": 0, "batch": 0, "train": 0}
    remote.close()


def test_items_come_in_chunks_and_none_is_lost() -> None:
    items = [PrelabelItem(key=str(number), image=ImageRef(url="a.png")) for number in range(7)]
    chunks = list(in_chunks(iter(items), 3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert [item for chunk in chunks for item in chunk] == items
