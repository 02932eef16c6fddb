from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from ml_backend.cli import main


def test_parts_are_added_to_a_file_of_figures(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"batch_ratio": {"tiny": 0.5}}))
    result = CliRunner().invoke(main, ["bench", "--only", "rle", "--quick", "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["batch_ratio"] == {"tiny": 0.5}
    assert {"encode_ratio", "encode_ratio_specks", "decode_ratio"} <= set(found["rle"])


def test_an_unknown_part_is_named() -> None:
    result = CliRunner().invoke(main, ["bench", "--only", "rle,speed"])
    assert result.exit_code == 2
    assert "no part speed" in result.output
