"""From clicks in the log over an export to `evaluate --sessions`: what annotators did, as the strategy `human`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from evaluation.datasets import read_pairs
from evaluation.replay import Recorded, ReplayError, Step, agreement, assign, file_name, read_sessions
from ml_backend.clicks.export import export
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.schema import make_engine, migrate
from ml_backend.commands.evaluate import evaluate
from tests.ml_backend.clicks.conftest import answer
from tests.ml_backend.clicks.test_store import write
from worker.contract import Box, Click, Prompts

WIDTH, HEIGHT = 80, 64
A, B, C = ("a", 30.0, 25.0), ("b", 60.0, 50.0, False), ("c", 45.0, 12.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images: one with a square and a smaller one in it, one with a square; faint: a second click counts."""
    root = tmp_path / "squares"
    root.mkdir()
    boxes = {"big": (slice(10, 40), slice(20, 50)), "small": (slice(20, 30), slice(25, 35))}
    pairs = []
    for number, names in enumerate((("big", "small"), ("big",))):
        image = np.random.default_rng(number).integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for name in names:
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[boxes[name]] = 255
            image[mask > 0] += 25
            Image.fromarray(mask).save(root / f"{name}-{number}.png")
            pairs.append({"image": f"my picture {number}.png", "mask": f"{name}-{number}.png"})
        Image.fromarray(image).save(root / f"my picture {number}.png")
    (root / "metadata.json").write_text(json.dumps({"name": "squares", "pairs": pairs}))
    return root


@pytest.fixture
def exported(tmp_path: Path) -> dict[str, Path]:
    """Sessions of one object: with an undo, as if that had not been, with a drag, with a box; two of another image."""
    engine = make_engine(None, tmp_path / "log")
    migrate(engine)
    picture = {"image": "/data/upload/3/0123abcd-my_picture_0.png", "width": WIDTH, "height": HEIGHT}
    other = picture | {"image": "/data/local-files/?d=pictures/my%20picture%201.png"}

    def session(name: str, *states: tuple[tuple[object, ...], ...], **more: object) -> None:
        for state in states:
            prompts = [(f"{name}-{id_}", *place) for id_, *place in state]
            write(engine, answer(prompts, **{**picture, **more}))  # type: ignore[arg-type]

    session("1undone", (A,), (A, B), (A, C))
    session("2plain", (A,), (A, C))
    session("3moved", (("a", 24.0, 14.0),), (A,))
    session("4boxed", (("a", 25.0, 20.0, True, 36.0, 31.0),))
    session("5elsewhere", (("a", 70.0, 60.0),), **other)
    session("6other", (A,), (A, C), **other)
    paths = {}
    for format_ in ("csv", "jsonl", "parquet"):
        paths[format_] = tmp_path / f"clicks.{format_}"
        export(engine, format_, paths[format_], chosen=Filter(), key=b"key")
    engine.dispose()
    return paths


@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_what_was_clicked_comes_back(exported: dict[str, Path], format_: str) -> None:
    undone, plain, moved, boxed, elsewhere, _ = read_sessions(exported[format_])
    a, b, c = (Click(x=x, y=y, positive=not rest) for _, x, y, *rest in (A, B, C))
    assert (undone.image, undone.width, undone.height) == ("0123abcd-my_picture_0.png", WIDTH, HEIGHT)
    assert [step.prompts.clicks for step in undone.steps] == [(a,), (a, b), (a, c)]
    assert [step.click for step in undone.steps] == [a, b, c]
    assert [step.prompts.clicks for step in plain.steps] == [(a,), (a, c)]
    assert [step.prompts.clicks for step in moved.steps] == [(Click(x=24, y=14),), (a,)]
    assert boxed.steps[0].prompts == Prompts(box=Box(x0=25, y0=20, x1=36, y1=31))
    assert elsewhere.image == "my picture 1.png"


def test_a_session_finds_its_object(exported: dict[str, Path], folder: Path) -> None:
    found = assign(read_sessions(exported["csv"]), read_pairs(folder))
    by_object = {key[1].partition("-")[2]: [one.session[4:] for one in mine] for key, mine in found.items()}
    # A click into both objects of the first image is taken for the smaller one; one outside it tells. The fifth session
    # clicked beside the object.
    assert by_object == {
        "big-0": ["1undone-a", "2plain-a"],
        "small-0": ["3moved-a", "4boxed-a"],
        "big-1": ["6other-a"],
    }


def test_images_of_one_name_are_told_apart_by_their_size(exported: dict[str, Path], folder: Path) -> None:
    pairs = read_pairs(folder)
    sessions = [
        Recorded("s", pair.image.name, HEIGHT, WIDTH, (Step(Click(x=30, y=25), Prompts(clicks=(Click(x=30, y=25),))),))
        for pair in pairs
    ]
    assert assign(sessions, pairs) == {}


def test_agreement() -> None:
    truth = np.zeros((10, 20), bool)
    truth[2:6, 4:12] = True
    clicks = tuple(Click(x=x, y=y, positive=p) for x, y, p in ((5.5, 3.5, True), (0.5, 0.5, False), (20, 10, True)))
    assert agreement(Prompts(clicks=clicks), truth) == pytest.approx(2 / 3)
    assert agreement(Prompts(box=Box(x0=4, y0=2, x1=12, y1=6)), truth) == 1
    assert agreement(Prompts(box=Box(x0=4, y0=2, x1=8, y1=6)), truth) == 0.5
    assert agreement(Prompts(box=Box(x0=13, y0=2, x1=15, y1=6)), truth) == 0


def test_file_names() -> None:
    assert file_name("/data/upload/3/0123abcd-truck.jpg") == "0123abcd-truck.jpg"
    assert file_name("/data/local-files/?d=a/b%20c.png") == "b c.png"
    assert file_name("https://host/x/y.png?size=3") == "y.png"
    assert file_name("s3://bucket/deep/z.tif") == "z.tif"


def test_evaluate_replays_an_export(exported: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(folder), "--strategies", "oracle", "--clicks", "3", "--seeds", "1", "--film", "0"]
    arguments += ["--backbone", "tiny", "--device", "cpu", "--head", "none", "--out", str(out)]
    arguments += ["--sessions", str(exported["csv"])]
    done = CliRunner().invoke(evaluate, arguments)
    assert done.exit_code == 0, done.output
    assert "5 of 6 sessions are on 3 of 3 objects" in done.output
    with (out / "clicks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    human = [row for row in rows if row["strategy"] == "human"]
    undone, plain = ([row for row in human if row["pair"] == "0000-big-0" and row["seed"] == seed] for seed in "01")
    assert [(row["x"], row["y"], row["positive"]) for row in undone] == [
        ("30.0", "25.0", "1"),
        ("60.0", "50.0", "0"),
        ("45.0", "12.0", "1"),
    ]
    # The mask after an undo is as if the click had never been; who has stopped keeps the mask.
    assert undone[0]["iou"] == plain[0]["iou"]
    assert undone[2]["iou"] == plain[1]["iou"] == plain[2]["iou"] != plain[0]["iou"]
    assert (plain[2]["x"], len(plain)) == ("", 3)
    (boxed,) = (row for row in human if row["pair"] == "0001-small-0" and row["seed"] == "1" and row["click"] == "1")
    assert (boxed["x"], boxed["y"]) == ("25.0", "20.0")
    overall = json.loads((out / "summary.json").read_text())["overall"]
    assert set(overall) == {"oracle", "human"}
    assert overall["human"]["pairs"] == overall["oracle"]["pairs"] == 3
    assert "rank_without_truth" not in overall["human"], "people know the object"
    before = (out / "clicks.csv").read_text()
    assert CliRunner().invoke(evaluate, arguments).exit_code == 0
    assert (out / "clicks.csv").read_text() == before, "nothing is replayed twice"
    changed = CliRunner().invoke(evaluate, [*arguments[:-1], str(exported["jsonl"])])
    assert changed.exit_code == 2
    assert "another set-up" in changed.output


def test_what_cannot_be_replayed_is_said(exported: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(evaluate, ["--data", str(folder), "--out", str(tmp_path / "o"), *arguments])
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        return done.output

    assert "give --sessions" in refused("--strategies", "human")
    assert "cannot be read: No such file" in refused("--sessions", str(tmp_path / "gone.csv"))
    assert "is none of .csv, .jsonl, .parquet" in refused("--sessions", "clicks.xlsx")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "is no export of the click log" in refused("--sessions", str(tmp_path / "other.csv"))
    lines = exported["csv"].read_text().splitlines(keepends=True)
    (tmp_path / "none.csv").write_text("".join([lines[0], *(line for line in lines if "5elsewhere" in line)]))
    assert "None of the 1 sessions" in refused("--sessions", str(tmp_path / "none.csv"))
    with pytest.raises(ReplayError):
        read_sessions(folder)
