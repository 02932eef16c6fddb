from __future__ import annotations

import base64
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tests.worker.conftest import PICTURE, Server
from worker.contract import ImageRef, RuntimeOptions
from worker.images.addresses import is_public
from worker.images.errors import ImageError
from worker.images.fetch import fetch


def jwt(**claims: Any) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.signature"


PERSONAL = jwt(token_type="refresh", exp=4_000_000_000, iat=0)


def options(label_studio: Server | None = None, key: str | None = None, **more: Any) -> RuntimeOptions:
    return RuntimeOptions(
        data_dir=Path("unused"),
        label_studio_url=label_studio.url if label_studio else None,
        label_studio_api_key=SecretStr(key) if key else None,
        **more,
    )


def refused(url: str, with_options: RuntimeOptions, **ref: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        fetch(ImageRef(url=url, **ref), with_options)
    return caught.value


@pytest.mark.parametrize(
    "url",
    ["/data/upload/3/a.png", "data/upload/3/a.png", "upload/3/a.png", "/upload/3/a.png", "{ls}/data/upload/3/a.png"],
)
def test_uploads_come_from_label_studio_with_a_legacy_token(label_studio: Server, url: str) -> None:
    label_studio.says("/data/upload/3/a.png")
    ref = ImageRef(url=url.format(ls=label_studio.url))
    assert fetch(ref, options(label_studio, "0123456789abcdef")) == PICTURE
    assert label_studio.asked == [("GET", "/data/upload/3/a.png", "Token 0123456789abcdef")]


def test_a_personal_access_token_is_exchanged_once_and_renewed_after_a_401(label_studio: Server) -> None:
    fresh = iter(jwt(token_type="access", iat=0, exp=300, number=n) for n in range(9))
    issued: list[str] = []

    def refresh(handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        issued.append(next(fresh))
        handler.reply(200 if body == {"refresh": PERSONAL} else 401, json.dumps({"access": issued[-1]}).encode())

    def image(handler: Any) -> None:
        good = issued and handler.headers.get("Authorization") == f"Bearer {issued[-1]}"
        handler.reply(200 if good else 401, PICTURE)

    label_studio.answers["/api/token/refresh"] = refresh
    label_studio.answers["/data/local-files/"] = image
    ref = ImageRef(url="/data/local-files/?d=a/b.png")
    assert [fetch(ref, options(label_studio, PERSONAL)) for _ in range(3)] == [PICTURE] * 3
    assert len(issued) == 1
    issued.append("revoked")
    assert fetch(ref, options(label_studio, PERSONAL)) == PICTURE
    assert len(issued) == 3
    assert all(PERSONAL not in (given or "") for _, _, given in label_studio.asked)


def test_a_token_that_is_refused_says_which_variable(label_studio: Server) -> None:
    label_studio.says("/data/upload/3/a.png", 401)
    assert "LABEL_STUDIO_API_KEY" in refused("/data/upload/3/a.png", options(label_studio)).hint
    for key in ("legacy-secret", PERSONAL):
        error = refused("/data/upload/3/a.png", options(label_studio, key))
        assert "LABEL_STUDIO_API_KEY" in error.error
        assert error.status == 401
        assert key not in str(error)
    assert "LABEL_STUDIO_URL" in refused("/data/upload/3/a.png", options()).hint


def test_cloud_urls_go_through_the_task_or_the_project(label_studio: Server, other: Server) -> None:
    other.says("/bucket/a.png")
    for owner in ("tasks/7", "projects/2"):
        label_studio.sends(f"/{owner}/resolve/", f"{other.url}/bucket/a.png?X-Amz-Signature=s")
    with_minio = options(label_studio, "legacy", allowed_hosts=(f"127.0.0.1:{other.port}",))
    for url in ("s3://bucket/a.png", "gs://bucket/a.png", "azure-blob://bucket/a.png"):
        assert fetch(ImageRef(url=url, task=7), with_minio) == PICTURE
        asked = label_studio.asked[-1]
        assert base64.urlsafe_b64decode(asked[1].partition("fileuri=")[2]).decode() == url
        assert asked[2] == "Token legacy"
    assert fetch(ImageRef(url="s3://bucket/a.png", project=2), with_minio) == PICTURE
    assert all(given is None for _, _, given in other.asked)
    assert "task" in refused("s3://bucket/a.png", with_minio).error


def test_the_token_goes_to_no_other_host_port_path_or_redirect(label_studio: Server, other: Server) -> None:
    everywhere = options(label_studio, "legacy", allowed_hosts=("127.0.0.1", "localhost"))
    other.says("/data/upload/3/a.png")
    assert fetch(ImageRef(url=f"{other.url}/data/upload/3/a.png"), everywhere) == PICTURE
    label_studio.sends("/data/upload/3/b.png", f"{other.url}/data/upload/3/a.png")
    assert fetch(ImageRef(url="/data/upload/3/b.png"), everywhere) == PICTURE
    assert [given for _, _, given in other.asked] == [None, None]
    label_studio.asked.clear()
    label_studio.says("/data/upload/3/a.png")
    label_studio.says("/api/users/")
    other.sends("/back", f"{label_studio.url}/data/upload/3/a.png")
    fetch(ImageRef(url=f"{other.url}/back"), everywhere)
    fetch(ImageRef(url=f"{label_studio.url}/api/users/"), everywhere)
    fetch(ImageRef(url=f"http://localhost:{label_studio.port}/data/upload/3/a.png"), everywhere)
    assert [given for _, _, given in label_studio.asked] == [None, None, None]


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


def test_local_files_only_under_their_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-secret"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    inside = root / "sub" / "a b.png"
    inside.write_bytes(PICTURE)
    (outside / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "inner.png").symlink_to(inside)
    allowed = options(local_roots=(root,))
    for url in (str(inside), f"file://{inside}", f"file://localhost{inside}".replace(" ", "%20"), f"{root}/inner.png"):
        assert fetch(ImageRef(url=url), allowed) == PICTURE
    for url in (
        f"{outside}/secret.png",
        f"{root}/../root-secret/secret.png",
        f"{root}/link.png",
        f"{root}/folder/secret.png",
        f"file://{root}/%2e%2e/root-secret/secret.png",
        f"{root}/loop",
        f"{root}/sub",
        f"{root}/\0",
        "/etc/passwd",
        "/dev/zero",
        "sub/a b.png",
    ):
        assert refused(url, allowed).status in (403, 404), url
    assert "BALD_SAM_LOCAL_ROOTS" in refused(str(inside), options()).hint
    assert fetch(ImageRef(url=str(inside)), options(local_roots=(inside.parent,))) == PICTURE


def test_a_link_as_root_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.png").write_bytes(PICTURE)
    link = tmp_path / "link"
    link.symlink_to(real)
    assert fetch(ImageRef(url=f"{link}/a.png"), options(local_roots=(link,))) == PICTURE


def test_data_urls() -> None:
    body = base64.b64encode(PICTURE).decode()
    assert fetch(ImageRef(url=f"data:image/png;base64,{body}"), options()) == PICTURE
    for url in ("data:,abc", "data:image/png;base64,!!", "data:image/png,abc"):
        assert refused(url, options()).status == 400
    assert refused("data:image/png;base64," + "A" * 3_000_000, options(max_image_mb=1)).status == 413


def test_bytes_are_counted_declared_or_not(other: Server) -> None:
    allowed = options(allowed_hosts=("127.0.0.1",), max_image_mb=1)
    other.says("/declared", body=b"x" * ((1 << 20) + 1))

    def endless(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(1000):
                handler.wfile.write(b"x" * 65536)
        except OSError:
            pass

    other.answers["/endless"] = endless
    for path in ("/declared", "/endless"):
        error = refused(other.url + path, allowed)
        assert error.status == 413
        assert "BALD_SAM_MAX_IMAGE_MB" in error.hint


@pytest.mark.parametrize("headers_first", [True, False])
def test_a_server_that_drips_is_given_up(other: Server, headers_first: bool) -> None:
    def drip(handler: Any) -> None:
        if headers_first:
            handler.send_response(200)
            handler.end_headers()
        try:
            for _ in range(600):
                handler.wfile.write(b"x" if headers_first else b"H")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    other.answers["/drip"] = drip
    start = time.monotonic()
    error = refused(other.url + "/drip", options(allowed_hosts=("127.0.0.1",), fetch_timeout_s=0.5))
    assert error.status == 504
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("encoding", ["chunked", "gzip"])
def test_bodies_in_pieces_arrive_whole(other: Server, encoding: str) -> None:
    body = bytes(range(256)) * 2000

    def pieces(handler: Any) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        data = body
        if encoding == "gzip":
            data = gzip.compress(body)
            handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        for start in range(0, len(data), 50_000):
            piece = data[start : start + 50_000]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")

    other.answers["/a"] = pieces
    assert fetch(ImageRef(url=other.url + "/a"), options(allowed_hosts=("127.0.0.1",))) == body


def test_a_body_that_ends_early_is_no_image(other: Server) -> None:
    def short(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x")

    other.answers["/a"] = short
    assert refused(other.url + "/a", options(allowed_hosts=("127.0.0.1",))).status == 502


def test_a_passing_failure_is_tried_again_and_a_lasting_one_told(other: Server) -> None:
    states = iter([503, 502, 200])
    other.answers["/a"] = lambda handler: handler.reply(next(states), PICTURE)  # type: ignore[attr-defined]
    other.says("/b", 500)
    allowed = options(allowed_hosts=("127.0.0.1",))
    assert fetch(ImageRef(url=other.url + "/a"), allowed) == PICTURE
    assert refused(other.url + "/b?signature=secret", allowed).status == 502
    assert "secret" not in str(refused(other.url + "/b?signature=secret", allowed))
    assert refused(other.url + "/missing", allowed).status == 404
    other.sends("/loop", "/loop")
    assert "redirects too often" in refused(other.url + "/loop", allowed).error


def test_a_host_that_is_down_is_named() -> None:
    server = Server()
    server.close()
    error = refused("/data/upload/1/a.png", options(server, "legacy"))
    assert error.status == 502
    assert "LABEL_STUDIO_URL" in error.hint


def test_label_studio_under_a_path(label_studio: Server) -> None:
    label_studio.says("/ls/data/upload/1/a.png")
    under = options(label_studio, "legacy").model_copy(update={"label_studio_url": label_studio.url + "/ls/"})
    for url in ("/data/upload/1/a.png", "/ls/data/upload/1/a.png"):
        assert fetch(ImageRef(url=url), under) == PICTURE
    assert [given for _, _, given in label_studio.asked] == ["Token legacy"] * 2


def test_uploads_in_a_bucket_come_by_the_other_route(label_studio: Server) -> None:
    label_studio.says("/storage-data/uploaded/")
    assert fetch(ImageRef(url="/data/upload/1/a.png"), options(label_studio, "legacy")) == PICTURE
    assert label_studio.asked[-1][1:] == ("/storage-data/uploaded/?filepath=upload/1/a.png", "Token legacy")
