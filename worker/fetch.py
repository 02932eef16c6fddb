"""Fetch the bytes of a task's image: from Label Studio, the web, stated local folders, or the URL itself."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR
from urllib.parse import parse_qs, quote, unquote, urljoin

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Retry, Timeout, Url, parse_url

from worker.addresses import ImageError, guarded_pool
from worker.contract import ImageRef, RuntimeOptions
from worker.label_studio_auth import authorization

MAX_REDIRECTS = 5
CHUNK = 1 << 16
#: Paths of Label Studio that hold images. The token goes to these and to no other.
LABEL_STUDIO_PATHS = re.compile(
    r"/(data/upload/|data/local-files/?$|storage-data/|(tasks|projects)/\d+/(resolve|presign)/)"
)
CLOUD = ("s3:", "gs:", "azure-blob:")
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
Origin = tuple[str, str, int]


def fetch(ref: ImageRef, options: RuntimeOptions) -> bytes:
    """Bytes of the image that `ref.url` names, at most `options.max_image_mb`.

    Understands Label Studio's uploads and local-files URLs, s3://, gs:// and azure-blob:// through Label Studio,
    http(s), base64 data: URLs, and paths or file:// under `options.local_roots`. Raises ImageError.
    """
    url = ref.url.strip()
    scheme = url.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+._-]*:", url) else ""
    if scheme == "data":
        return _inline(url, options)
    if len(url) > MAX_URL:
        raise ImageError(
            f"The image URL is longer than {MAX_URL} characters.", "Check the URL in the task's data.", 400
        )
    if scheme in ("http", "https") or url.startswith(CLOUD):
        return _Download(options).get(_resolve_route(ref, url, options) if url.startswith(CLOUD) else url)
    if scheme == "file":
        host, _, path = url[len("file:") :].removeprefix("//").partition("/")
        if host not in ("", "localhost"):
            raise ImageError("A file:// URL cannot name another machine.", "Use an http(s) URL.", 400)
        return _local(unquote("/" + path), options)
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
    base = _base(options)
    if base and base.path and path.startswith(base.path.rstrip("/") + "/"):
        path = path[len(base.path.rstrip("/")) :]
    if not LABEL_STUDIO_PATHS.match(path.partition("?")[0]):
        return _local(path, options)
    wanted = _label_studio_url(path, options)
    try:
        return _Download(options).get(wanted)
    except ImageError as error:
        if error.status != 404 or not path.startswith("/data/upload/"):
            raise
    # Label Studio with uploads in a bucket serves them under another route.
    name = unquote(path.removeprefix("/data/"))
    return _Download(options).get(_label_studio_url(f"/storage-data/uploaded/?filepath={quote(name)}", options))


class _Download:
    """One GET with its redirects, under one deadline."""

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        self.base = _base(options)
        self.limit = options.max_image_mb << 20
        self.deadline = time.monotonic() + options.fetch_timeout_s
        self.opened: list[HTTPConnection] = []
        self.from_label_studio = False

    def get(self, url: str) -> bytes:
        self.from_label_studio = self.base is not None and _origin(_parse(url)) == _origin(self.base)
        pool = guarded_pool(self._trusted, self.opened, self._left)
        # A read time-out starts anew with every byte; this one does not.
        watchdog = threading.Timer(self.options.fetch_timeout_s, self._abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            return self._follow(pool, url)
        except (HTTPError, OSError) as error:
            host = _parse(url).host
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
        return self.from_label_studio and self.base is not None and (host, port) == _origin(self.base)[1:]

    def _follow(self, pool: urllib3.PoolManager, url: str) -> bytes:
        renewed = False
        for _ in range(MAX_REDIRECTS + 1):
            target = _parse(url)
            # Once a redirect has left Label Studio, neither its token nor its trust comes back.
            self.from_label_studio &= self.base is not None and _origin(target) == _origin(self.base)
            if self.from_label_studio and _climbs(target.path or "", target.query or ""):
                raise _climbing()
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
                    url = _joined(url, location)
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
        url = _label_studio_url("/api/token/refresh", self.options)
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


def too_large(options: RuntimeOptions) -> ImageError:
    return ImageError(
        f"The image is larger than {options.max_image_mb} MB.",
        "Use a smaller image, or raise BALD_SAM_MAX_IMAGE_MB.",
        413,
    )


def _inline(url: str, options: RuntimeOptions) -> bytes:
    head, _, body = url.partition(",")
    if len(body) > (options.max_image_mb << 20) * 4 // 3 + 4:
        raise too_large(options)
    try:
        if not head.endswith(";base64"):
            raise ValueError(head)
        return base64.b64decode(unquote(body), validate=True)
    except (ValueError, binascii.Error):
        raise ImageError("The data: URL holds no base64 image.", "Upload the picture as a file.", 400) from None


def _local(name: str, options: RuntimeOptions) -> bytes:
    """Bytes of a regular file that lies, links followed, under one of the roots."""
    refused = ImageError(
        f"The image path {name[:200]} is not in a folder that may be read.",
        "Put its folder into BALD_SAM_LOCAL_ROOTS, or give the task an http(s) URL.",
        403,
    )
    path = Path(name)
    if not path.is_absolute() or ".." in path.parts or "\0" in name:
        raise refused
    # Whether a path outside the roots exists is nobody's business: refuse by name before touching the disk.
    if not any(path.is_relative_to(root) or path.is_relative_to(root.resolve()) for root in options.local_roots):
        raise refused
    try:
        real = path.resolve(strict=True)
        root = next((root for root in map(Path.resolve, options.local_roots) if root in real.parents), None)
        if root is None:
            raise refused
        descriptor = _open_beneath(root, real)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refused
            data = file.read((options.max_image_mb << 20) + 1)
    except (OSError, RuntimeError) as error:
        raise ImageError(
            f"The image {name[:200]} cannot be read.", "Check that the file is there and readable.", 404
        ) from error
    if len(data) > options.max_image_mb << 20:
        raise too_large(options)
    return data


def _open_beneath(root: Path, real: Path) -> int:
    """Descriptor of a file, opened folder by folder without following a link: nobody can bend the way meanwhile."""
    through = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
    folder = os.open(root, through)
    try:
        *folders, name = real.relative_to(root).parts
        for part in folders:
            inner = os.open(part, through, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


def _base(options: RuntimeOptions) -> Url | None:
    if not options.label_studio_url:
        return None
    return _parse(options.label_studio_url.rstrip("/"))


def _parse(url: str) -> Url:
    try:
        parsed = parse_url(url)
    except LocationParseError:
        raise ImageError("The image URL cannot be read.", "Check the URL in the task's data.", 400) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ImageError("The image URL is not http(s).", "Check the URL in the task's data.", 400)
    return parsed


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise ImageError(
            "The image URL redirects to one that cannot be read.", "Open the task's URL in a browser.", 502
        ) from None


def _origin(url: Url) -> Origin:
    scheme = url.scheme or "http"
    return scheme, (url.host or "").lower().strip("[]").rstrip("."), url.port or (443 if scheme == "https" else 80)


def _label_studio_url(path: str, options: RuntimeOptions) -> str:
    """Absolute URL of a path of Label Studio, without any way up."""
    if not options.label_studio_url:
        raise ImageError(
            "The image is stored in Label Studio, and its address is not known.",
            "Set LABEL_STUDIO_URL, and LABEL_STUDIO_API_KEY to a personal access token.",
            400,
        )
    route, _, query = path.partition("?")
    if _climbs(route, query):
        raise _climbing()
    return options.label_studio_url.rstrip("/") + path


def _climbs(route: str, query: str) -> bool:
    """Whether a path or a value of its query leads up, however often it is encoded: a server in between may decode."""
    for sent in (route, *(value for values in parse_qs(query).values() for value in values)):
        value, plain = sent, unquote(sent)
        while plain != value:
            value, plain = plain, unquote(plain)
        if ".." in value.replace("\\", "/").split("/"):
            return True
    return False


def _climbing() -> ImageError:
    return ImageError("The image path climbs out of its folder.", "Remove the .. from the task's data.", 403)


def _resolve_route(ref: ImageRef, url: str, options: RuntimeOptions) -> str:
    """Label Studio's route that hands out a cloud object of the task's (or project's) storages."""
    encoded = base64.urlsafe_b64encode(url.encode()).decode()
    if ref.task is not None:
        return _label_studio_url(f"/tasks/{ref.task}/resolve/?fileuri={encoded}", options)
    if ref.project is not None:
        return _label_studio_url(f"/projects/{ref.project}/resolve/?fileuri={encoded}", options)
    raise ImageError(
        f"A {url.partition(':')[0]}: image is read through Label Studio, which needs its task.",
        "Open it from a task, or give an http(s) URL.",
        400,
    )
