"""A head after calibration is the best of those that were played, and stops as its sessions say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation.calibration import calibrated, with_head
from evaluation.scenes import draw
from evaluation.session import Session
from worker import training
from worker.acquisition import DEFAULT
from worker.backbones import Backbone, build
from worker.encode import encode
from worker.head.kernel import Reach
from worker.head.store import Head
from worker.proposer import Proposer

CLICKS = 3
NARROW, WIDE = Reach(colour=0.08), Reach(colour=3.0)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.set_num_threads(1)
    return build("tiny", device="cpu")


@pytest.fixture(scope="module")
def opened(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Session]]:
    proposer = Proposer(backbone, data_dir=tmp_path_factory.mktemp("data"))
    found = []
    for seed in range(910_000, 910_004):
        scene = draw(seed, (96, 128), "objects")
        embedding = encode(backbone, scene.image)
        found.append((str(seed), Session(backbone, proposer, embedding, scene.image, scene.labels == 1, None)))
    return found


def mean_iou(head: Head, opened: list[tuple[str, Session]]) -> float:
    ious = []
    for _, session in opened:
        mine = replace(session, proposer=with_head(session.proposer, head))
        ious += [row["iou"] for row in mine.play(DEFAULT, 0, CLICKS)]
    return float(np.mean(np.array(ious, dtype=float)))


@pytest.mark.parametrize("reach", [NARROW, WIDE])
def test_the_best_of_what_was_played_is_taken(
    backbone: Backbone, opened: list[tuple[str, Session]], monkeypatch: pytest.MonkeyPatch, reach: Reach
) -> None:
    monkeypatch.setattr(training, "REACHES", (NARROW, WIDE))
    stages = []

    def sessions(stage: str) -> Iterator[tuple[str, Session]]:
        stages.append(stage)
        yield from opened

    head = replace(opened[0][1].proposer.head, reach=reach)
    made, found = calibrated(backbone, head, sessions, clicks=CLICKS)
    assert stages == ["reach", "calibrating"]
    assert found.objects == len(opened)
    assert {"sam", "head"} <= set(found.iou) <= {"sam", "head", "reach"}
    assert mean_iou(made, opened) == pytest.approx(max(found.iou.values()))
    assert found.iou["head"] == pytest.approx(mean_iou(replace(head, shows="head"), opened))
    assert made.stop == {DEFAULT: found.stop.threshold}
    assert made.notes["calibration"]["mean_iou"] == found.iou


def test_without_sessions_it_is_refused(backbone: Backbone, opened: list[tuple[str, Session]]) -> None:
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrated(backbone, opened[0][1].proposer.head, lambda _: iter(()))
