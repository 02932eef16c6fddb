"""The job functions on a drawn image on disk: fetch, encode, decode, propose, mask, RLE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from worker import brush_rle, preemption, runtime, tasks
from worker.contract import NotQuickError, RuntimeOptions, SegmentResult

torch.set_num_threads(2)
HEIGHT, WIDTH = 203, 301


@pytest.fixture(autouse=True)
def picture(tmp_path: Path) -> str:
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    image[(rows - 100) ** 2 + (cols - 150) ** 2 < 50**2] = (210, 60, 40)
    Image.fromarray(image).save(tmp_path / "disc.png")
    _restart(tmp_path)
    return str(tmp_path / "disc.png")


def _restart(folder: Path, **changes: Any) -> None:
    runtime._runtime = None
    runtime.configure(RuntimeOptions(data_dir=folder, device="cpu", local_roots=(folder,), **changes))


def _job(url: str, *clicks: tuple[float, float, bool], **changes: Any) -> dict[str, Any]:
    given = [{"x": x, "y": y, "positive": positive} for x, y, positive in clicks]
    job = {"image": {"url": url}, "width": WIDTH, "height": HEIGHT, "prompts": {"clicks": given}, "session": "s"}
    return {**job, **changes}


def _mask(result: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return brush_rle.decode(SegmentResult.model_validate(result).rle, result["height"], result["width"])


CLICKS = [(150.0, 100.0, True), (10.0, 10.0, False), (130.0, 90.0, True)]


def test_a_click_becomes_a_mask(picture: str) -> None:
    result = tasks.segment(_job(picture, *CLICKS[:1]))
    SegmentResult.model_validate(result)
    mask = _mask(result)
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask.sum() == result["area"]
    assert mask[100, 150]
    assert {"fetch", "encode", "decode", "propose", "mask", "rle"} <= set(result["timings"])
    assert result["proposal"] or result["stopped"]
    assert result["model_version"].startswith("tiny-")


def test_a_restart_changes_nothing(picture: str, tmp_path: Path) -> None:
    for count in (1, 2, 3):
        warm = tasks.segment(_job(picture, *CLICKS[:count]))
    _restart(tmp_path)
    cold = tasks.segment(_job(picture, *CLICKS))
    for field in set(warm) - {"timings"}:
        assert warm[field] == cold[field], field


def test_redis_and_memory_give_the_same_answer(picture: str, tmp_path: Path, redis_url: str) -> None:
    plain = tasks.segment(_job(picture, *CLICKS))
    for _ in range(2):
        _restart(tmp_path, redis_url=redis_url)
        result = tasks.segment(_job(picture, *CLICKS))
        assert result["rle"] == plain["rle"]
    assert "encode" not in result["timings"]  # the second process found the first one's embedding


def test_the_mask_has_the_size_of_the_job(picture: str) -> None:
    doubled = [(2 * x, 2 * y, positive) for x, y, positive in CLICKS]
    large = tasks.segment(_job(picture, *doubled, width=2 * WIDTH, height=2 * HEIGHT))
    small = tasks.segment(_job(picture, *CLICKS))
    assert _mask(large).shape == (2 * HEIGHT, 2 * WIDTH)
    assert (_mask(large)[::2, ::2] == _mask(small)).mean() > 0.97
    if small["proposal"]:
        assert large["proposal"]["x"] == pytest.approx(2 * small["proposal"]["x"])


def test_prompts_outside_move_to_the_border(picture: str) -> None:
    result = tasks.segment(_job(picture, (WIDTH + 40.0, -3.0, True)))
    assert _mask(result)[0, WIDTH - 1]


def test_a_box_alone_and_without_proposal(picture: str) -> None:
    prompts = {"box": {"x0": 95, "y0": 45, "x1": 205, "y1": 155}}
    result = tasks.segment(_job(picture, prompts=prompts, propose=False))
    assert result["kind"] == "segment"
    assert result["proposal"] is None


def test_foreseen_faults_are_failures(picture: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    outside = {"box": {"x0": WIDTH + 1, "y0": 0, "x1": WIDTH + 9, "y1": 9}}
    cases = {
        "missing": (_job(str(tmp_path / "no.png"), *CLICKS), None),
        "broken": (_job(str(tmp_path / "broken.png"), *CLICKS), 415),
        "not allowed": (_job("/etc/passwd", *CLICKS), None),
        "no prompt": (_job(picture), 422),
        "box": (_job(picture, prompts=outside), 422),
        "strategy": (_job(picture, *CLICKS, strategy="guess"), 422),
        "schema": ({"image": 1}, 422),
    }
    for name, (job, status) in cases.items():
        result = tasks.segment(job)
        assert result["kind"] == "failure", name
        assert result["error"], name
        assert result["hint"], name
        assert 400 <= result["status"] < 504, name
        assert status is None or result["status"] == status, name
    assert tasks.segment(_job(picture, *CLICKS))["kind"] == "segment"


def test_weights_that_are_not_there_are_a_sentence(picture: str, tmp_path: Path) -> None:
    _restart(tmp_path, backbone="vit_b")
    result = tasks.segment(_job(picture, *CLICKS))
    assert result["status"] == 503
    assert "bald-sam models download vit_b" in result["error"]


def test_an_unforeseen_fault_is_logged_under_its_incident(
    picture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(tasks, "to_mask", fail)
    result = tasks.segment(_job(picture, *CLICKS))
    assert result["status"] == 500
    assert "secret" not in str(result)
    incident = result["hint"].split()[-1].rstrip(".")
    assert incident in caplog.text


def test_out_of_memory_frees_the_caches_and_tries_once_more(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = tasks.decode_session, []

    def scarce(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return real(*args)

    monkeypatch.setattr(tasks, "decode_session", scarce)
    assert tasks.segment(_job(picture, *CLICKS))["kind"] == "segment"
    assert len(calls) == 2


def test_a_device_that_stays_out_of_memory_leaves_the_job_to_the_processor(
    picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, current = tasks.segment(_job(picture, *CLICKS)), runtime.runtime()
    real, emptied = tasks._segment, []
    monkeypatch.setattr(current.backbone, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))

    def scarce(job: Any, used: Any) -> Any:
        if used is current:
            raise torch.OutOfMemoryError
        return real(job, used)

    monkeypatch.setattr(tasks, "_segment", scarce)
    assert tasks.segment(_job(picture, *CLICKS))["rle"] == expected["rle"]
    assert emptied


def test_embed_encodes_ahead(picture: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "no.png")
    result = tasks.embed({"images": [{"url": picture}, {"url": missing}]})
    assert result["done"] == 1
    assert set(result["failed"]) == {missing}
    assert "encode" not in tasks.segment(_job(picture, *CLICKS))["timings"]


def test_the_object_is_looked_at_from_near(picture: str, tmp_path: Path) -> None:
    result = tasks.segment(_job(picture, *CLICKS[:1]))
    assert result["timings"]["zoom"] > 0
    assert result["timings"]["decode"] > 0
    again = tasks.segment(_job(picture, *CLICKS[:1]))
    assert again["rle"] == result["rle"]
    _restart(tmp_path, zoom="off")
    whole = tasks.segment(_job(picture, *CLICKS[:1]))
    assert "zoom" not in whole["timings"]
    assert runtime.runtime().pixels.max_bytes == 0, "embeddings have that memory"
    # The masks of so simple a picture may be the same: both borders are guided to where it has its own.
    assert whole["predicted_iou"] != result["predicted_iou"]


def test_parts_of_an_image_that_memory_has_lost_are_read_again(picture: str, tmp_path: Path) -> None:
    warm = [tasks.segment(_job(picture, *CLICKS[:count])) for count in (1, 2, 3)]
    current = runtime.runtime()
    current.pixels.clear()
    current.logits.clear()
    current.embeddings.clear_memory()
    assert tasks.segment(_job(picture, *CLICKS))["rle"] == warm[-1]["rle"]
    assert len(current.pixels) == 1


@pytest.mark.parametrize("now", ["gone", "another"])
def test_an_image_that_is_gone_is_answered_as_a_whole(
    now: str, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_is_remote", lambda _url: True)  # embeddings of such are found without a request
    _restart(tmp_path, zoom="off")
    whole = tasks.segment(_job(picture, *CLICKS))
    _restart(tmp_path)
    assert tasks.embed({"images": [{"url": picture}]})["done"] == 1
    runtime.runtime().pixels.clear()
    if now == "gone":
        Path(picture).unlink()
    else:
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(picture)
    result = tasks.segment(_job(picture, *CLICKS))
    assert result["rle"] == whole["rle"]
    again = tasks.segment(_job(picture, *CLICKS, (140.0, 110.0, True)))
    assert again["kind"] == "segment"
    assert caplog.text.count("is not looked at from near") == (now == "gone"), "it is tried once, not by each click"


def test_warm_up_loads_everything() -> None:
    runtime.warm_up()
    assert runtime.runtime().proposer.model_version.startswith("tiny-")


def test_what_has_to_be_encoded_is_not_quick(picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "ASK_EVERY_S", -1.0)
    found: list[dict[str, Any] | None] = []

    def attempt() -> None:
        try:
            found.append(tasks.segment(_job(picture, *CLICKS)))
        except NotQuickError:
            found.append(None)

    with preemption.letting_through(attempt, quick=True):
        preemption.give_way()
    assert found == [None]
    expected = tasks.segment(_job(picture, *CLICKS))
    with preemption.letting_through(attempt, quick=True):
        preemption.give_way()
    assert found[1] is not None
    assert found[1]["rle"] == expected["rle"]
