from __future__ import annotations

from pathlib import Path

import pytest

from ml_backend.prelabel.journal import Journal, JournalInUse, read_journal


def test_what_was_noted_is_there_after_a_kill_in_mid_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path).open({"a": 1})
    journal.add("1", {"x": [1, 2]})
    journal.fail("2", "No.")
    journal.fail("3", "No.")
    journal.add("3", None)
    journal.close()
    with path.open("a") as file:
        file.write('\n{"key": "4", "do')
    again = Journal(path).open({"a": 1})
    assert again.done == {"1": {"x": [1, 2]}, "3": None}
    assert again.failed == {"2": "No."}
    again.add("5", 1)
    again.close()
    assert set(read_journal(path).done) == {"1", "3", "5"}


def test_another_run_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path).open({"a": 1})
    journal.add("1", 1)
    journal.close()
    other = Journal(path).open({"a": 2})
    assert other.done == {}
    other.close()
    assert read_journal(path).header == {"a": 2}
    kept = Journal(path).open()
    assert kept.header == {"a": 2}
    kept.close(delete=True)
    assert not path.exists()
    assert read_journal(path).done == {}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl").open({})
    with pytest.raises(JournalInUse, match="another process"):
        Journal(tmp_path / "run.jsonl").open({})
    journal.close()
    Journal(tmp_path / "run.jsonl").open({}).close()
