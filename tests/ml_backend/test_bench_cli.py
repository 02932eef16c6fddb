from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evaluation.bench import report
from evaluation.bench.server import has_redis
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
