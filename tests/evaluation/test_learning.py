from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import learning
from evaluation.learning import compare, decide, learn, split
from worker import brush_rle, runtime
from worker.contract import (
    Box,
    Click,
    HeadChoice,
    ImageRef,
    LabelledObject,
    Prompts,
    RuntimeOptions,
    SegmentJob,
    TrainJob,
    TrainResult,
)
from worker.head.store import Head, load_head
from worker.preemption import letting_through
from worker.runtime import Runtime
from worker.tasks import JobError, segment

IMAGES = 9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers: what is tested is what happens, not how good the head is."""
    torch.set_num_threads(1)
    monkeypatch.setattr(learning, "MOST_CALIBRATED", 2)
    monkeypatch.setattr(learning, "STATES", 2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(IMAGES):
        pixels = np.full((60, 80, 3), 90, np.uint8)
        pixels[15 : 35 + number, 20:50] = (200, 60, 40)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def options(tmp_path: Path, pictures: Path) -> RuntimeOptions:
    return RuntimeOptions(data_dir=tmp_path / "data", device="cpu", local_roots=(pictures,), cache_mb=64)


def drawn(pictures: Path, number: int, **changes: Any) -> LabelledObject:
    truth = np.zeros((60, 80), dtype=bool)
    truth[15 : 35 + number, 20:50] = True
    packed = base64.b64encode(zlib.compress(bytes(brush_rle.encode(truth)))).decode()
    image = ImageRef(url=str(pictures / f"{number}.png"), task=number, project=3)
    fields = {"image": image, "region": f"r{number}", "width": 80, "height": 60, "mask": packed, **changes}
    return LabelledObject.model_validate(fields)


def job(pictures: Path, **changes: Any) -> TrainJob:
    return TrainJob(project=3, objects=tuple(drawn(pictures, n) for n in range(IMAGES)), clicks=2, **changes)


def test_a_project_learns_and_running_workers_take_it_up(tmp_path: Path, pictures: Path) -> None:
    runtime.configure(options(tmp_path, pictures))
    current = runtime.runtime()
    state = Prompts(clicks=(Click(x=30.0, y=20.0),))
    odd = Prompts(box=Box(x0=18.0, y0=12.0, x1=52.0, y1=40.0))
    objects = list(job(pictures).objects)
    objects[1] = drawn(pictures, 1, states=(state, odd))
    objects.append(drawn(pictures, 0, image=ImageRef(url=str(pictures / "gone.png"), task=99), region="gone"))
    asked = TrainJob(project=3, objects=tuple(objects), clicks=2, force=True)

    def click(project: int) -> dict[str, Any]:
        return segment(
            SegmentJob(
                image=ImageRef(url=str(pictures / "0.png"), project=project), width=80, height=60,
                prompts=Prompts(clicks=(Click(x=30.5, y=25.5),)), session="s",
            ).model_dump(mode="json")
        )  # fmt: skip

    before = click(3)
    assert "/project-" not in before["model_version"]
    stages: list[str] = []
    answered: list[str] = []

    def somebody_clicks() -> None:
        if len(answered) < 3:
            answered.append(click(3)["model_version"])

    with letting_through(somebody_clicks):
        result = learn(asked, current, report=lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["learning", "reach", "calibrating", "judging"]
    assert answered == [before["model_version"]] * 3
    assert (result.head, result.used, result.logged) == ("project-3-v1", True, 1 if result.logged else 0)
    assert "gone.png" in next(iter(result.skipped))
    assert result.images_held_out >= 3 and result.objects + result.held_out == IMAGES
    # The same object, the next click: the project's own head; others keep theirs.
    assert "/project-3-v1-" in click(3)["model_version"]
    assert click(4)["model_version"] == before["model_version"]
    described = json.loads((tmp_path / "data" / "heads" / "project-3-v1" / "head.json").read_text())
    assert described["notes"]["held_out"]["auc"] == pytest.approx(result.auc)
    assert described["shows"] in ("sam", "head") and described["notes"]["project"] == 3
    current.heads.rollback(3)
    assert click(3)["model_version"] == before["model_version"]


def test_a_head_that_is_not_better_is_kept_and_not_used(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = Runtime(options(tmp_path, pictures))
    monkeypatch.setattr(learning, "judge", lambda _, sessions, **__: [(name, (0.8, 0.79)) for name, _ in sessions])
    before = current.proposer_of(3).head.id
    result = learn(job(pictures), current)
    assert not result.used and "not clearly better" in result.reason
    assert current.proposer_of(3).head.id == before
    assert current.heads.names() == ["project-3-v1"]


def test_a_head_learns_from_all_masks_and_its_successor_is_compared_with_what_it_was_before(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = Runtime(options(tmp_path, pictures))
    compared: list[list[Head]] = []

    def judge(heads: list[Head], sessions: Any, **_: Any) -> list[tuple[str, tuple[float, float]]]:
        compared.append(list(heads))
        return [(name, (0.5, 0.6)) for name, _ in sessions]

    monkeypatch.setattr(learning, "judge", judge)
    first = learn(job(pictures), current)
    path = current.heads.path(first.head)
    kept = load_head(path)
    assert kept.judged is not None and kept.notes["objects"] == IMAGES == first.objects + first.held_out
    assert torch.equal(kept.judged.mean, compared[0][1].posterior.mean)
    assert not torch.equal(kept.posterior.mean, kept.judged.mean)
    assert torch.equal(current.proposer_of(3).head.posterior.mean, kept.posterior.mean)
    # The one in use is judged as it was before it had seen the tasks that both are judged on.
    learn(job(pictures, seed=1), current)
    assert torch.equal(compared[1][0].posterior.mean, kept.judged.mean)
    assert compared[1][0].id == kept.id


def test_a_broken_head_in_use_does_not_stop_clicks(tmp_path: Path, pictures: Path) -> None:
    current = Runtime(options(tmp_path, pictures))
    shipped = current.proposer_of(3).head.id
    folder = tmp_path / "data" / "heads" / "broken"
    folder.mkdir(parents=True)
    (folder / "head.json").write_text(json.dumps({"backbone": current.backbone.id}))
    (folder / "head.safetensors").write_bytes(b"no numbers")
    current.heads.use("broken", 3)
    assert current.proposer_of(3).head.id == shipped


def test_the_split_never_changes_for_a_task(pictures: Path) -> None:
    def held(numbers: range) -> set[int | None]:
        one = drawn(pictures, 0)
        objects = [one.model_copy(update={"image": one.image.model_copy(update={"task": n})}) for n in numbers]
        return {each.image.task for each in split(TrainJob(project=3, objects=tuple(objects)))[1]}

    small, large = held(range(100)), held(range(200))
    assert small == {n for n in large if n is not None and n < 100}
    assert 10 <= len(small) <= 40
    learnt, apart = split(job(pictures))
    assert not {o.image.task for o in learnt} & {o.image.task for o in apart}
    assert len(learnt) >= learning.LEAST_TRAINED and len(apart) >= learning.LEAST_HELD_OUT


def test_too_few_images_are_said(tmp_path: Path, pictures: Path) -> None:
    few = TrainJob(project=3, objects=tuple(drawn(pictures, n) for n in range(7)))
    with pytest.raises(JobError, match="masks on 7 images; learning needs at least 8"):
        split(few)
    runtime.configure(options(tmp_path, pictures))
    answer = learning.train(few.model_dump(mode="json"))
    assert answer["kind"] == "failure" and answer["status"] == 422


def test_the_error_counts_images_not_objects() -> None:
    values = [0.1, 0.3, -0.2, 0.0, 0.25]
    mean, error = compare([(str(n), value) for n, value in enumerate(values)])
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
    # Ten objects that say the same about each image say no more than one.
    assert compare([(str(n), value) for n, value in enumerate(values) for _ in range(10)]) == pytest.approx(
        (mean, error)
    )


@pytest.mark.parametrize(
    ("gain", "error", "pinned", "force", "used"),
    [
        (0.02, 0.01, False, False, True),
        (0.01, 0.02, False, False, False),
        (-0.05, 0.01, False, False, False),
        (0.02, 0.01, True, False, False),
        (-0.05, 0.01, True, True, True),
    ],
)
def test_only_a_better_head_is_used_unless_asked(
    gain: float, error: float, pinned: bool, force: bool, used: bool
) -> None:
    assert decide(gain, error, HeadChoice(pinned=pinned), force=force)[0] is used


def test_a_training_result_travels(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.configure(options(tmp_path, pictures))
    monkeypatch.setattr(learning, "judge", lambda _, sessions, **__: [(name, (0.5, 0.6)) for name, _ in sessions])
    run: Callable[[dict[str, Any]], dict[str, Any]] = learning.train
    result = TrainResult.model_validate(run(job(pictures).model_dump(mode="json")))
    assert result.used and result.gain == pytest.approx(0.1)
