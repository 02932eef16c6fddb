"""Logs one click every 20 ms and says so, until it is killed: `python killed.py DATA_DIR [URL]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ml_backend.clicks import ClickLog
from tests.ml_backend.clicks.conftest import answer

log = ClickLog(data_dir=Path(sys.argv[1]), url=sys.argv[2] if len(sys.argv) > 2 else None)
number = 0
while True:
    number += 1
    click = answer([(f"p{number}", 1.0, 1.0)])
    log.answered(click)
    sys.stdout.write(f"{click.event} {time.time()}\n")
    sys.stdout.flush()
    time.sleep(0.02)
