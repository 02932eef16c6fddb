"""Fetch the bytes of a task's image: from Label Studio, the web, stated local folders, or the URL itself."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import suppress
from socket import SHUT_RDWR
from urllib.parse import quote, unquote

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, Timeout, Url

from worker.contract import ImageRef, RuntimeOptions
from worker.images.addresses import guarded_pool
from worker.images.errors import ImageError
from worker.images.label_studio_auth import authorization
from worker.images.local import inline, local, too_large
from worker.images.urls import (
    CLOUD,
    LABEL_STUDIO_PATHS,
    climbing,
    climbs,
    joined,
    label_studio_base,
    label_studio_url,
    origin,
    parse,
    resolve_route,
)

MAX_REDIRECTS = 5
CHUNK = 1 << 16
#: Longest URL that is followed, characters; data: URLs are as long as their image.
MAX_URL = 8192
#: What a server says in Retry-After is not followed: it may say a day.
RETRY = Retry(
    total=2,
    redirect=False,
    status_forcelist=(500, 502, 503, 504),
    backoff_factor=0.2,
    raise_on_status=False,
    respect_retry_after_header=False,
)


def fetch(ref: ImageRef, options: RuntimeOptions) -> bytes:
    """Bytes of the image that `ref.url` names, at most `options.max_image_mb`.

    Understands Label Studio's uploads and local-files URLs, s3://, gs:// and azure-blob:// through Label Studio,
    http(s), base64 data: URLs, and paths or file:// under `options.local_roots`. Raises ImageError.
    """
    url = ref.url.strip()
    scheme = url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+._-]*:", url) else ""
    if scheme == "data":
        return inline(url, options)
    if len(url) > MAX_URL:
        raise ImageError(
            f"The image URL is longer than {MAX_URL} characters.", "Check the URL in the task's data.", 400
        )
    if scheme in ("http", "https") or url.startswith(CLOUD):
        return _Download(options).get(resolve_route(ref, url, options) if url.startswith(CLOUD) else url)
    if scheme == "file":
        host, _, path = url[len("file:") :].removeprefix("//").partition("/")
        if host not in ("", "localhost"):
            raise ImageError("A file:// URL cannot name another machine.", "Use an http(s) URL.", 400)
        return local(unquote("/" + path), options)
    if scheme:
        raise ImageError(f"Images cannot be fetched from {scheme}: URLs.", "Use http(s), s3, gs or azure-blob.", 400)
    return _relative(url, options)


def _relative(url: str, options: RuntimeOptions) -> bytes:
    """A path of Label Studio, or else a local file."""
    path = url if url.startswith("/data/") else url.removeprefix("/").removeprefix("data/")
    if path.startswith("upload/"):
        path = "/data/" + path
    elif not path.startswith("/data/"):
        path = url
    base = label_studio_base(options)
    if base and base.path and path.startswith(base.path.rstrip("/") + "/"):
        path = path[len(base.path.rstrip("/")) :]
    if not LABEL_STUDIO_PATHS.match(path.partition("?")[0]):
        return local(path, options)
    wanted = label_studio_url(path, options)
    try:
        return _Download(options).get(wanted)
    except ImageError as error:
        if error.status != 404 or not path.startswith("/data/upload/"):
            raise
    # Label Studio with uploads in a bucket serves them under another route.
    name = unquote(path.removeprefix("/data/"))
    return _Download(options).get(label_studio_url(f"/storage-data/uploaded/?filepath={quote(name)}", options))


class _Download:
    """One GET with its redirects, under one deadline."""

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        self.base = label_studio_base(options)
        self.limit = options.max_image_mb << 20
        self.deadline = time.monotonic() + options.fetch_timeout_s
        self.opened: list[HTTPConnection] = []
        self.from_label_studio = False

    def get(self, url: str) -> bytes:
        self.from_label_studio = self.base is not None and origin(parse(url)) == origin(self.base)
        pool = guarded_pool(self._trusted, self.opened, self._left)
        # A read time-out starts anew with every byte; this one does not.
        watchdog = threading.Timer(self.options.fetch_timeout_s, self._abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            return self._follow(pool, url)
        except (HTTPError, OSError) as error:
            host = parse(url).host
            if time.monotonic() >= self.deadline:
                raise self._too_slow() from None
            reason = type(getattr(error, "reason", None) or error).__name__
            hint = "Check that this machine reaches it"
            hint += "; LABEL_STUDIO_URL says where Label Studio is." if self.from_label_studio else "."
            raise ImageError(f"The image host {host} cannot be reached ({reason}).", hint, 502) from None
        finally:
            watchdog.cancel()
            pool.clear()

    def _too_slow(self) -> ImageError:
        return ImageError(
            f"Fetching the image took more than {self.options.fetch_timeout_s:g} s.",
            "Check the network, or raise BALD_SAM_FETCH_TIMEOUT_S.",
            504,
        )

    def _abort(self) -> None:
        for connection in list(self.opened):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(SHUT_RDWR)

    def _left(self) -> float:
        """Seconds until the deadline. Asked before each connection: no retry begins after it."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        return left

    def _trusted(self, host: str, port: int) -> bool:
        names = {name.lower().strip("[]") for name in self.options.allowed_hosts}
        if host.lower() in names or f"{host.lower()}:{port}" in names:
            return True
        return self.from_label_studio and self.base is not None and (host, port) == origin(self.base)[1:]

    def _follow(self, pool: urllib3.PoolManager, url: str) -> bytes:
        renewed = False
        for _ in range(MAX_REDIRECTS + 1):
            target = parse(url)
            # Once a redirect has left Label Studio, neither its token nor its trust comes back.
            self.from_label_studio &= self.base is not None and origin(target) == origin(self.base)
            if self.from_label_studio and climbs(target.path or "", target.query or ""):
                raise climbing()
            headers = {"Accept": "image/*,*/*;q=0.5", "User-Agent": "bald-sam"}
            key = self.options.label_studio_api_key
            inside = (target.path or "/").removeprefix((self.base.path or "").rstrip("/")) if self.base else ""
            authorized = self.from_label_studio and key is not None and bool(LABEL_STUDIO_PATHS.match(inside))
            if authorized and key is not None:
                value = authorization(
                    str(self.base), key.get_secret_value(), lambda token: self._refresh(pool, token), renew=renewed
                )
                headers["Authorization"] = value
            response = self._request(pool, "GET", url, headers)
            try:
                if response.status == 401 and authorized and not renewed:
                    renewed = True
                    continue
                location = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = joined(url, location)
                    if self.from_label_studio and "/user/login" in url:
                        raise self._unauthorized()
                    pool.clear()  # a connection kept open would skip the check of its address
                    continue
                return self._body(response, target)
            finally:
                response.close()
        raise ImageError("The image URL redirects too often.", "Put the final URL into the task.", 502)

    def _request(
        self, pool: urllib3.PoolManager, method: str, url: str, headers: dict[str, str], body: bytes | None = None
    ) -> urllib3.BaseHTTPResponse:
        left = max(0.05, self.deadline - time.monotonic())
        timeout = Timeout(connect=min(5.0, left), read=left)
        return pool.urlopen(
            method,
            url,
            headers=headers,
            body=body,
            redirect=False,
            retries=RETRY,
            timeout=timeout,
            preload_content=False,
        )

    def _refresh(self, pool: urllib3.PoolManager, token: str) -> str:
        url = label_studio_url("/api/token/refresh", self.options)
        body = json.dumps({"refresh": token}).encode()
        response = self._request(pool, "POST", url, {"Content-Type": "application/json"}, body)
        try:
            if response.status in (301, 302, 303, 307, 308):
                raise ImageError(
                    "Label Studio answers its token route with a redirect.",
                    "Set LABEL_STUDIO_URL to the address it redirects to (https instead of http, most often).",
                    502,
                )
            if response.status != 200:
                raise self._unauthorized()
            access = json.loads(response.read(CHUNK)).get("access")
        except (ValueError, AttributeError):
            raise self._unauthorized() from None
        finally:
            response.close()
        if not isinstance(access, str):
            raise self._unauthorized()
        return access

    def _unauthorized(self) -> ImageError:
        if self.options.label_studio_api_key is None:
            return ImageError(
                "Label Studio wants a token for its images.",
                "Set LABEL_STUDIO_API_KEY to a personal access token (Account & Settings in Label Studio).",
                401,
            )
        return ImageError(
            "Label Studio does not accept the token in LABEL_STUDIO_API_KEY.",
            "Make a new personal access token (Account & Settings); legacy tokens are off on a default install.",
            401,
        )

    def _body(self, response: urllib3.BaseHTTPResponse, target: Url) -> bytes:
        status, host = response.status, target.host
        if status in (401, 403) and self.from_label_studio:
            raise self._unauthorized()
        if status in (404, 410):
            raise ImageError(f"{host} has no image at {target.path}.", "Check the URL in the task's data.", 404)
        if status != 200:
            raise ImageError(f"{host} answered {status} for the image.", "Open the task's URL in a browser.", 502)
        declared = response.headers.get("Content-Length", "")
        if declared.isdigit() and int(declared) > self.limit:
            raise too_large(self.options)
        body = bytearray()
        while chunk := response.read1(CHUNK):  # what is there, not a whole chunk: the clock is looked at each time
            body += chunk
            if len(body) > self.limit:
                raise too_large(self.options)
            if time.monotonic() >= self.deadline:
                raise TimeoutError
        if time.monotonic() >= self.deadline:
            raise TimeoutError
        return bytes(body)
