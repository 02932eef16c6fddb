"""The backup of docs/operations.md, taken while clicks come in, and restored elsewhere."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

from ml_backend.clicks import ClickLog
from tests.ml_backend.clicks.conftest import answer

PAGE = Path(__file__).parents[3] / "docs/operations.md"


def events(data_dir: Path) -> list[str]:
    with sqlite3.connect(data_dir / "clicks.sqlite") as connection:
        return [event for (event,) in connection.execute("SELECT event FROM answers")]


def test_a_backup_under_load_has_every_click_of_before_once(data_dir: Path, tmp_path: Path) -> None:
    (commands,) = re.findall(r"```\n(cd /var/lib/bald-sam\ntar .*?)```", PAGE.read_text(), re.S)
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    backup.mkdir()
    restored.mkdir()
    for path, ours in {
        "/var/lib/bald-sam": str(data_dir),
        "/opt/bald-sam/venv/bin/python": sys.executable,
        "/backup": str(backup),
    }.items():
        commands = commands.replace(path, ours)
    log, answered, stop = ClickLog(data_dir=data_dir), dict[str, float](), threading.Event()

    def work() -> None:
        while not stop.is_set():
            click = answer([(f"p{len(answered)}", 1.0, 1.0)])
            log.answered(click)
            answered[click.event] = time.monotonic()
            time.sleep(0.005)

    thread = threading.Thread(target=work)
    thread.start()
    while len(answered) < 200:
        time.sleep(0.05)
    begun = time.monotonic()
    subprocess.run(["bash", "-c", commands], check=True)
    stop.set()
    thread.join()
    assert log.flush()
    log.close()

    subprocess.run(["tar", "-xzf", backup / "bald-sam.tar.gz", "-C", restored], check=True)
    (backup / "clicks.sqlite").rename(restored / "clicks.sqlite")
    again = ClickLog(data_dir=restored)
    assert again.flush()
    again.close()
    found = events(restored)
    assert len(found) == len(set(found))
    # A second is what a click may take into the journal.
    assert {event for event, moment in answered.items() if moment < begun - 1.0} <= set(found)
    assert len(found) > 50
