"""The click log as files, with and without the names of people."""

from __future__ import annotations

import csv
import json
import stat
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from ml_backend.clicks import LoggedPrompt
from ml_backend.clicks.export import FORMATS, export
from ml_backend.clicks.filter import Filter, parse_day
from ml_backend.clicks.people import read_key
from ml_backend.clicks.table import COLUMNS
from ml_backend.commands.clicks import FORMATS as OFFERED
from ml_backend.commands.clicks import clicks
from tests.ml_backend.clicks.conftest import HIDDEN, answer, disc, region, webhook
from tests.ml_backend.clicks.test_store import write

WANTED = [
    *("session", "project", "task", "user", "arm", "click", "time", "x", "y", "positive", "origin"),
    *("proposal_x", "proposal_y", "proposal_positive", "proposal_score", "distance_px", "strategy", "model_version"),
    *("predicted_iou", "iou_to_final", "delta_iou", "answer_ms"),
]


@pytest.fixture
def filled(engine):
    """Two objects: one of Anna's with a followed proposal, one of nobody known, of another project and day."""
    a, b = ("a", 60.0, 40.0), ("b", 70.0, 45.5, False)
    write(
        engine,
        answer([a], disc(10), proposal=(70, 45, False), received=1_800_000_000.125, user="anna@example.com"),
        answer([a, b], disc(18), received=1_800_000_004.0),
        webhook([region(disc(20), "mask-a")], user=7),
        answer([("z", 1.0, 2.0)], project=8, session="8:4:z", arm=HIDDEN, received=1_800_100_000.0),
    )
    return engine


def rows(engine, tmp_path, key=b"secret", chosen=None):
    """The export as read back from CSV."""
    path = tmp_path / "clicks.csv"
    assert export(engine, "csv", path, chosen=chosen or Filter(), key=key) == len(path.read_text().splitlines()) - 1
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_are_those_promised_in_that_order():
    assert list(COLUMNS)[: len(WANTED)] == WANTED
    assert FORMATS == OFFERED, "the command line lists them without importing the exporter"


def test_csv(filled, tmp_path):
    first, second, third = rows(filled, tmp_path)
    assert list(first) == list(COLUMNS)
    assert (first["session"], first["origin"], first["click"], first["time"]) == (
        "3:4:a",
        "human",
        "1",
        "2027-01-15T08:00:00.125Z",
    )
    assert (second["origin"], second["positive"], second["x"], second["y"]) == ("suggested", "false", "70", "45.5")
    assert (second["proposal_x"], second["proposal_y"], second["proposal_positive"]) == ("70", "45", "false")
    assert (second["distance_px"], second["answer_ms"]) == ("0.5", "250")
    gained = float(second["iou_to_final"]) - float(first["iou_to_final"])
    assert float(second["delta_iou"]) == pytest.approx(gained)
    assert (third["arm"], third["user"], third["iou_to_final"], third["outcome"]) == ("hide", "", "", "")
    assert not list(tmp_path.glob("*.part"))


def test_every_format_says_the_same(filled, tmp_path):
    wanted = rows(filled, tmp_path)
    assert export(filled, "jsonl", tmp_path / "c.jsonl", chosen=Filter(), key=b"secret") == 3
    assert export(filled, "parquet", tmp_path / "c.parquet", chosen=Filter(), key=b"secret") == 3
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "c.parquet").to_pylist()
    for text, line, row in zip(wanted, lines, table, strict=True):
        assert list(text) == list(line) == list(row)
        row["time"] = row["time"].strftime("%Y-%m-%dT%H:%M:%S.") + f"{row['time'].microsecond // 1000:03d}Z"
        for name, value in row.items():
            if isinstance(value, float):
                assert line[name] == pytest.approx(value, rel=1e-8)
                assert float(text[name]) == pytest.approx(value, rel=1e-8)
            else:
                assert line[name] == value
                assert text[name] == (
                    "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
                )


def test_any_text_survives(engine, tmp_path):
    odd = 'quote " backslash \\ line\n tab\t bell\x07 é 漢 😀 \u2028'
    write(engine, answer([(odd, 1.0, 2.0)], session=f"3:4:{odd}", strategy=odd))
    for format_ in ("csv", "jsonl", "parquet"):
        export(engine, format_, tmp_path / format_, chosen=Filter(), key=None)
    with (tmp_path / "csv").open(newline="", encoding="utf-8") as file:
        found = [*csv.DictReader(file)]
    found += [json.loads((tmp_path / "jsonl").read_text(encoding="utf-8").rstrip("\n"))]
    found += pq.read_table(tmp_path / "parquet").to_pylist()
    for row in found:
        assert (row["session"], row["prompt"], row["strategy"]) == (f"3:4:{odd}", odd, odd)


def test_pointprompt(filled, tmp_path):
    out = tmp_path / "points"
    assert export(filled, "pointprompt", out, chosen=Filter(), key=b"secret") == 2
    image = json.loads((out / "3" / "4.json").read_text())
    assert (image["image"], image["width"], image["height"]) == ("/data/upload/3/4.jpg", 120, 80)
    (thing,) = image["objects"]
    assert [(s["positive"], s["negative"]) for s in thing["steps"]] == [([[60, 40]], []), ([[60, 40]], [[70, 45.5]])]
    assert thing["steps"][0]["proposal"] == {"x": 70, "y": 45, "positive": False, "score": 0.3, "shown": True}
    assert thing["steps"][1]["seconds"] == 3.875
    assert thing["steps"][1]["iou_to_final"] > thing["steps"][0]["iou_to_final"]
    assert json.loads((out / "8" / "4.json").read_text())["objects"][0]["arm"] == "hide"


def test_points_of_each_step_are_those_of_its_own_prompts(engine, tmp_path):
    """Steps that add a prompt, add none, move one, take one away, bring a box."""
    a, b, moved = ("a", 60.0, 40.0), ("b", 70.0, 45.0, False), ("a", 61.0, 40.0)
    boxed = (LoggedPrompt("a", 10.0, 20.0, True, 30.0, 40.0), LoggedPrompt(*b))
    steps = [[a], [a, b], [a, b], [moved, b], [moved], [moved, ("c", 1.0, 2.0), ("d", 3.0, 4.0)]]
    answers = [answer(prompts, session="3:4:a") for prompts in steps]
    write(engine, *answers, replace(answer([a], session="3:4:a"), prompts=boxed))
    export(engine, "pointprompt", tmp_path, chosen=Filter(), key=None)
    (thing,) = json.loads((tmp_path / "3" / "4.json").read_text())["objects"]
    assert [(step["positive"], step["negative"]) for step in thing["steps"]] == [
        ([[60, 40]], []),
        ([[60, 40]], [[70, 45]]),
        ([[60, 40]], [[70, 45]]),
        ([[61, 40]], [[70, 45]]),
        ([[61, 40]], []),
        ([[61, 40], [1, 2], [3, 4]], []),
        ([], [[70, 45]]),
    ]
    assert [step.get("box") for step in thing["steps"]] == [None] * 6 + [[10, 20, 30, 40]]


def test_people_are_pseudonyms_that_depend_on_a_secret(filled, tmp_path, data_dir):
    name = rows(filled, tmp_path)[0]["user"]
    assert name.startswith("u-")
    assert name == rows(filled, tmp_path)[1]["user"], "one person, though drafts and webhooks name her differently"
    assert name != rows(filled, tmp_path, key=b"another")[0]["user"]
    assert rows(filled, tmp_path, key=None)[0]["user"] == "anna@example.com"
    key = read_key(data_dir)
    assert key == read_key(data_dir)
    assert stat.S_IMODE((data_dir / "clicks.key").stat().st_mode) == 0o600


def test_filters(filled, tmp_path):
    assert [row["project"] for row in rows(filled, tmp_path, chosen=Filter(projects=(8,)))] == ["8"]
    day = parse_day("2027-01-16")
    assert day == datetime(2027, 1, 16, tzinfo=UTC)
    assert [row["project"] for row in rows(filled, tmp_path, chosen=Filter(since=day))] == ["8"]
    assert [row["project"] for row in rows(filled, tmp_path, chosen=Filter(until=day))] == ["3", "3"]


def test_the_command(filled, tmp_path, data_dir):
    run = CliRunner().invoke
    out = tmp_path / "out" / "clicks.csv"
    done = run(clicks, ["export", "--format", "csv", "--out", str(out), "--project", "3"])
    assert (done.exit_code, done.output) == (0, f"2 clicks in {out}\n")
    done = run(clicks, ["export", "--format", "jsonl", "--out", str(tmp_path / "c.jsonl"), "--json", "--with-users"])
    assert json.loads(done.output) == {"clicks": 3, "out": str(tmp_path / "c.jsonl")}
    assert "anna@example.com" in (tmp_path / "c.jsonl").read_text()
    done = run(clicks, ["export", "--format", "csv", "--out", str(out), "--since", "yesterday"])
    assert done.exit_code == 2
    assert "'yesterday' is no day such as 2026-11-23." in done.output
    done = run(clicks, ["export", "--format", "csv", "--out", "/proc/no/clicks.csv"])
    assert done.exit_code == 2
    assert done.output.startswith("Cannot write /proc/no/clicks.csv")
    done = run(clicks, ["report", "--url", "nonsense", "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 2
    assert "is not a database URL" in done.output
    done = run(clicks, ["migrate"])
    assert done.output == f"The click log in sqlite:///{data_dir}/clicks.sqlite is up to date.\n"
