from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import learning
from evaluation.learning import FOLDS, compare, decide, folds, learn
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
from worker.head.fit import Pixels
from worker.head.store import Head, load_head
from worker.preemption import letting_through
from worker.runtime import Runtime
from worker.tasks import JobError, segment
from worker.training import fit_head

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
    assert result.images_held_out == result.objects == result.held_out == IMAGES
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
    compared: list[dict[str, Sequence[Head]]] = []
    fitted_to: list[set[str]] = []

    def fit(backbone: Any, pixels: Pixels, *rest: Any, **more: Any) -> Head:
        fitted_to.append({pixels.names[number] for number in pixels.objects.tolist()})
        return fit_head(backbone, pixels, *rest, **more)

    def judge(heads: Callable[[str], Sequence[Head]], sessions: Any, **_: Any) -> list[tuple[str, tuple[float, float]]]:
        compared.append({name: heads(name) for name, _ in sessions})
        return [(name, (0.5, 0.6)) for name in compared[-1]]

    monkeypatch.setattr(learning, "judge", judge)
    monkeypatch.setattr(learning, "fit_head", fit)
    fold_of = folds(job(pictures))
    assert len(set(fold_of.values())) > 2
    in_use = current.proposer_of(3).head.id
    first = learn(job(pictures), current)
    kept = load_head(current.heads.path(first.head))
    assert fitted_to == [set(fold_of), *({name for name in fold_of if fold_of[name] != one} for one in range(FOLDS))]
    assert len(kept.unseen_by) == FOLDS and kept.notes["objects"] == IMAGES == first.objects
    for name, (before, new) in compared[0].items():
        assert torch.equal(new.posterior.mean, kept.unseen_by[fold_of[name]].mean)
        assert not torch.equal(new.posterior.mean, kept.posterior.mean)
        assert before.id == in_use and not before.unseen_by
    assert torch.equal(current.proposer_of(3).head.posterior.mean, kept.posterior.mean)
    # The one in use is judged by what had not seen the task either.
    learn(job(pictures, seed=1), current)
    for name, (before, _) in compared[1].items():
        assert before.id == kept.id
        assert torch.equal(before.posterior.mean, kept.unseen_by[fold_of[name]].mean)


def test_a_broken_head_in_use_does_not_stop_clicks(tmp_path: Path, pictures: Path) -> None:
    current = Runtime(options(tmp_path, pictures))
    shipped = current.proposer_of(3).head.id
    folder = tmp_path / "data" / "heads" / "broken"
    folder.mkdir(parents=True)
    (folder / "head.json").write_text(json.dumps({"backbone": current.backbone.id}))
    (folder / "head.safetensors").write_bytes(b"no numbers")
    current.heads.use("broken", 3)
    assert current.proposer_of(3).head.id == shipped


def test_the_fold_of_a_task_never_changes(pictures: Path) -> None:
    one = drawn(pictures, 0)

    def found(count: int) -> dict[str, int]:
        objects = [one.model_copy(update={"image": one.image.model_copy(update={"task": n})}) for n in range(count)]
        objects += [each.model_copy(update={"region": "another"}) for each in objects]
        return folds(TrainJob(project=3, objects=tuple(objects)))

    small, large = found(100), found(200)
    assert small.items() <= large.items()
    assert all(large[name] == large[name.replace("r0", "another")] for name in large)
    assert all(60 <= list(large.values()).count(fold) <= 140 for fold in range(FOLDS))


def test_too_few_images_are_said(tmp_path: Path, pictures: Path) -> None:
    few = TrainJob(project=3, objects=tuple(drawn(pictures, n) for n in range(7)))
    with pytest.raises(JobError, match="masks on 7 images; learning needs at least 8"):
        folds(few)
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
