"""Redis with a password and TLS, as BALD_SAM_REDIS_URL names it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from ml_backend.jobs.failures import JobFailed
from ml_backend.jobs.rq_runner import RqRunner
from ml_backend.processes import free_port
from tests.ml_backend.jobs.queue_workers import Workers, click, ready

PASSWORD = "pa55word-of-ours"


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Port of a Redis that speaks nothing but TLS and wants a password, and its certificate."""
    assert shutil.which("openssl"), "openssl is missing"
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    command = ["redis-server", "--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate)]
    command += ["--tls-key-file", str(key), "--tls-auth-clients", "no", "--requirepass", PASSWORD]
    command += ["--save", "", "--dir", str(tmp_path)]
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"rediss://:{PASSWORD}@localhost:{port}/0?ssl_ca_certs={certificate}"
        for _ in range(200):
            assert process.poll() is None, (tmp_path / "redis.log").read_text()
            with redis.Redis.from_url(url) as client:
                try:
                    client.ping()
                except redis.ConnectionError:
                    time.sleep(0.05)
                else:
                    break
        yield port, certificate
    finally:
        process.terminate()
        process.wait(10)


def test_a_click_through_tls_and_password_and_not_without(secured: tuple[int, Path], tmp_path: Path) -> None:
    port, certificate = secured
    url = f"rediss://:{PASSWORD}@localhost:{port}/0?ssl_ca_certs={certificate}"
    runner, workers = RqRunner(url), Workers(url, tmp_path)
    try:
        workers.start()
        ready(runner, 1)
        assert runner.segment(click("a"), deadline_s=10).area == 7
        assert PASSWORD not in workers.logs()
    finally:
        workers.stop()
        runner.close()
    for wrong, word in (
        (url.replace(PASSWORD, "wrong"), "password"),
        (f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}", "password"),
        (f"rediss://:{PASSWORD}@localhost:{port}/0", "reached"),  # a certificate that nobody vouches for
        (f"redis://:{PASSWORD}@localhost:{port}/0", "reached"),
    ):
        refused = RqRunner(wrong)
        with pytest.raises(JobFailed) as caught:
            refused.segment(click("a"), deadline_s=5)
        assert (caught.value.status, word in caught.value.error) == (503, True)
        assert PASSWORD not in str(caught.value)
        refused.close()
