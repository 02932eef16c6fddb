"""Time and memory of a report or export of a click log: `bench_clicks.py DIR report|csv|jsonl|parquet|pointprompt`."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

from ml_backend.clicks.export import export
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.report import render
from ml_backend.clicks.schema import make_engine

folder, what = Path(sys.argv[1]), sys.argv[2]
engine = make_engine(None, folder)
with tempfile.TemporaryDirectory(dir=folder) as out:
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "report":
        render(engine, chosen=Filter(), key=b"bench")
    else:
        export(engine, what, Path(out) / "clicks", chosen=Filter(), key=b"bench")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{what}: {wall:.1f} s, of it {cpu:.1f} s on the processor; {memory:.0f} MB")
