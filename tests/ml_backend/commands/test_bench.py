from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evaluation.bench import click, report
from evaluation.bench.server import has_redis
from evaluation.bench.setup import Bench
from ml_backend.cli import main

QUANTILES = {"p50", "p95", "p99"}


def bench(*options: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["bench", *map(str, options)])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_parts_are_added_to_a_file_of_figures(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"batch_ratio": {"tiny": 0.5}}))
    assert bench("--only", "rle", "--quick", "--json", path) == (found := json.loads(path.read_text()))
    assert found["batch_ratio"] == {"tiny": 0.5}
    assert {"encode_ratio", "encode_ratio_specks", "decode_ratio"} <= set(found["rle"])


@pytest.mark.skipif(not has_redis(), reason="redis-server is not installed")
def test_keys_and_report_of_a_quick_run(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results" / "speed.md"
    page.parent.mkdir(parents=True)
    (tmp_path / "docs" / "images").mkdir()
    page.write_text(f"# Speed\n\nBefore.\n\n{report.BEGIN}\nstale\n{report.END}\n\n## Remarks\nAfter.\n")
    found = bench("--quick", "--report", page, "--json", tmp_path / "bench.json")

    for size in ("1024x1024", "4000x3000"):
        ways = found["click"]["tiny"][size]
        assert set(ways) == {"embedded", "rq", "decoder", "stock"}
        assert all(set(times) >= QUANTILES for times in ways.values())
    assert found["proposal_share"]["tiny"] > 0
    assert {"encode_ratio", "encode_ratio_specks", "decode_ratio"} <= set(found["rle"])
    assert found["first_click_ratio"] > 0
    assert found["batch_ratio"]["tiny"] > 0
    assert all({"p50", "p95", "fairness"} <= set(one) for one in found["concurrency"].values())
    assert "slope_mb_per_100_images" in found["memory"]

    text = page.read_text()
    assert (
        text.startswith("# Speed\n\nBefore.\n\n<!--") and text.endswith("## Remarks\nAfter.\n") and "stale" not in text
    )
    assert "../images/performance.png" in text
    assert 0 < (tmp_path / "docs" / "images" / "performance.png").stat().st_size < 100_000
    bench("--only", "", "--report", page, "--json", tmp_path / "bench.json")
    assert page.read_text() == text


def test_a_page_that_is_not_there_yet(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    report.write({"batch": {"tiny": {"images_s": 3.0}}, "batch_ratio": {"tiny": 0.95}}, page)
    assert page.read_text().startswith("# Speed")
    assert "| `tiny` | 3.0 | - | 0.95 |" in page.read_text()


def test_an_unknown_part_is_named() -> None:
    result = CliRunner().invoke(main, ["bench", "--only", "rle,speed"])
    assert result.exit_code == 2
    assert "no part speed" in result.output


def test_an_unknown_size_is_named() -> None:
    result = CliRunner().invoke(main, ["bench", "--only", "click", "--sizes", "1024x1024,12x12"])
    assert result.exit_code == 2
    assert result.output == "There is no size 12x12; there are 1024x1024, 4000x3000.\n"


class _Stock:
    def __init__(self, backbone: Any) -> None: ...
    def look_at(self, embedding: Any) -> None: ...


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is started, drawn or timed; the names of the images that clicks would have been timed on."""
    images: list[str] = []

    def one(pages: Any, stock: Any, image: Path, *_: Any) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        images.append(image.stem)
        if len(images) == 3:
            raise KeyboardInterrupt
        milliseconds = float(len(images))
        return {way: [milliseconds] for way in report.WAYS}, {"propose": [milliseconds], "decode": [1.0]}

    monkeypatch.setattr(click, "_started", lambda bench, backbone: ({}, None))
    monkeypatch.setattr(click, "Stock", _Stock)
    monkeypatch.setattr(click, "_one", one)
    monkeypatch.setattr(click, "clicks_on", lambda *_: [])
    monkeypatch.setattr(Bench, "image", lambda self, name, *_: Path(f"{name}.jpg"))
    monkeypatch.setattr(click, "_padded", lambda *_: None)
    return images


def test_clicks_on_one_size(timed: list[str]) -> None:
    found = bench("--only", "click", "--sizes", "4000x3000", "--quick")
    assert timed == ["click-4000x3000"]
    assert all(set(found[key]["tiny"]) == {"4000x3000"} for key in ("click", "stages", "click_ratio"))


def test_clicks_that_are_cut_off_leave_the_figures_so_far(timed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    options = ["--only", "click", "--backbones", "tiny,vit_b", "--quick", "--json", str(path)]
    assert CliRunner().invoke(main, ["bench", *options]).exit_code == 1
    assert timed == ["click-1024x1024", "click-4000x3000", "click-1024x1024"]
    found = json.loads(path.read_text())
    assert {size: ways["rq"]["p50"] for size, ways in found["click"].pop("tiny").items()} == {
        "1024x1024": 1.0,
        "4000x3000": 2.0,
    }
    assert found["click"] == {} and found["measured_on"]["click"]["quick"] == "yes"
