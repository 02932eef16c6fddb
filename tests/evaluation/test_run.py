from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evaluation.datasets import read_pairs
from evaluation.run import COLUMNS, Setup, finished, is_random, run
from ml_backend.commands.evaluate import evaluate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small images with a square each."""
    root = tmp_path / "squares"
    root.mkdir()
    pairs = []
    for number in range(2):
        image = np.random.default_rng(number).integers(0, 90, (64, 80, 3), dtype=np.uint8)
        mask = np.zeros((64, 80), np.uint8)
        mask[10:40, 20 + number : 50] = 255
        image[mask > 0] += 120
        Image.fromarray(image).save(root / f"{number}.png")
        Image.fromarray(mask).save(root / f"m{number}.png")
        pairs.append({"image": f"{number}.png", "mask": f"m{number}.png"})
    (root / "metadata.json").write_text(json.dumps({"name": "squares", "pairs": pairs}))
    return root


def setup(tmp_path: Path, strategies: tuple[str, ...], **changes: object) -> Setup:
    torch.set_num_threads(2)
    values: dict[str, object] = {
        "backbone": "tiny",
        "checkpoint": None,
        "device": "cpu",
        "head": "none",
        "data_dir": tmp_path,
        "strategies": strategies,
        "clicks": 3,
        "seeds": 2,
        "random_weights": True,
        "threads": 2,
    }
    return Setup(**{**values, **changes})  # type: ignore[arg-type]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return sorted(tuple(row[column] for column in COLUMNS if column != "seconds") for row in rows)


def test_run_writes_every_click(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "clicks.csv"
    run(setup(tmp_path, ("bald", "random", "oracle", "human-like")), read_pairs(folder), path)
    rows = rows_of(path)
    assert tuple(rows[0]) == COLUMNS
    # bald and oracle draw nothing: one seed; random and human-like: two
    assert len(rows) == 2 * 3 * (1 + 2 + 1 + 2)
    firsts = {(row["pair"], row["x"], row["y"], row["iou"]) for row in rows if row["click"] == "1"}
    assert len(firsts) == 2  # every strategy starts from the same click and mask
    for row in rows:
        assert float(row["best_iou"]) >= float(row["iou"])
        if row["strategy"] == "oracle" and row["x"]:
            assert row["on_error"] == ("" if row["click"] == "1" else "1")
    assert {row["on_error"] for row in rows if row["strategy"] == "random"} == {"", "0", "1"}


def test_a_killed_run_goes_on_and_gives_the_same(folder: Path, tmp_path: Path) -> None:
    configuration, pairs = setup(tmp_path, ("bald", "random")), read_pairs(folder)
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    run(configuration, pairs, whole)
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:8]) + lines[8][:11])  # killed while writing the third session
    assert sum(len(jobs) for jobs in finished(part, 3).values()) == 2
    run(configuration, pairs, part)
    assert without_time(rows_of(part)) == without_time(rows_of(whole))
    before = part.read_text()
    run(configuration, pairs, part)
    assert part.read_text() == before


def test_baselines_play_too(folder: Path, tmp_path: Path) -> None:
    from evaluation.session import USERS

    path = tmp_path / "clicks.csv"
    names = tuple(name for name in USERS if name not in ("oracle", "human-like"))
    run(setup(tmp_path, names, seeds=1), read_pairs(folder)[:1], path)
    rows = rows_of(path)
    assert len(rows) == 3 * len(names)
    grabcut = [float(row["iou"]) for row in rows if row["strategy"] == "grabcut"]
    assert max(grabcut) > 0.8


def test_is_random() -> None:
    assert is_random("random") and is_random("human-like")
    assert not is_random("bald") and not is_random("oracle")
    with pytest.raises(ValueError, match="no strategy"):
        is_random("nonsense")


def test_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--strategies", "default,random,oracle", "--clicks", "2", "--seeds", "2"]
    arguments += ["--backbone", "tiny", "--random-weights", "--device", "cpu", "--head", "none", "--out", str(out)]
    result = CliRunner().invoke(evaluate, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    table = summary["datasets"]["squares"]
    assert len(table) == 3
    keys = {"iou_1", "iou_final", "best_iou", "delta_iou", "auc", "noc85", "noc90", "failures85", "failures90", "ci95"}
    assert all(keys | {"rank"} <= set(entry) for entry in table.values())
    assert summary["compact"].keys() == table.keys() and summary["thin"] == {}  # squares
    assert summary["stopping"] == {}  # a head that was not calibrated has no rule
    for name in ("curves.png", "curves_normalised.png", "ranks.png", "film_squares_0.png"):
        assert (out / name).stat().st_size > 1000
    other = CliRunner().invoke(evaluate, ["3" if part == "2" else part for part in arguments])
    assert other.exit_code == 2
    assert "another set-up" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--strategies", "nonsense"], "no strategy"), (["--data", "gone"], "no readable metadata.json")],
)
def test_command_says_what_is_wrong(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(evaluate, ["--data", str(folder), "--out", str(tmp_path / "o"), *arguments])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
