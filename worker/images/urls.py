"""What URLs of images say: where Label Studio keeps them, whose they are, whether they lead where they must not."""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qs, unquote, urljoin

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from worker.contract import ImageRef, RuntimeOptions
from worker.images.errors import ImageError

#: Paths of Label Studio that hold images. The token goes to these and to no other.
LABEL_STUDIO_PATHS = re.compile(
    r"/(data/upload/|data/local-files/?$|storage-data/|(tasks|projects)/\d+/(resolve|presign)/)"
)
CLOUD = ("s3:", "gs:", "azure-blob:")
Origin = tuple[str, str, int]


def label_studio_base(options: RuntimeOptions) -> Url | None:
    """Where Label Studio is, if that is known. Raises ImageError for an address that is no http(s) URL."""
    if not options.label_studio_url:
        return None
    return parse(options.label_studio_url.rstrip("/"))


def parse(url: str) -> Url:
    """The parts of an http(s) URL. Raises ImageError for any other."""
    try:
        parsed = parse_url(url)
    except LocationParseError:
        raise ImageError("The image URL cannot be read.", "Check the URL in the task's data.", 400) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ImageError("The image URL is not http(s).", "Check the URL in the task's data.", 400)
    return parsed


def joined(url: str, location: str) -> str:
    """Where a redirect from `url` to `location` leads. Raises ImageError for what cannot be read."""
    try:
        return urljoin(url, location)
    except ValueError:
        raise ImageError(
            "The image URL redirects to one that cannot be read.", "Open the task's URL in a browser.", 502
        ) from None


def origin(url: Url) -> Origin:
    """Scheme, host and port, written in one way: whose the URL is."""
    scheme = url.scheme or "http"
    return scheme, (url.host or "").lower().strip("[]").rstrip("."), url.port or (443 if scheme == "https" else 80)


def label_studio_url(path: str, options: RuntimeOptions) -> str:
    """Absolute URL of a path of Label Studio. Raises ImageError where its address is unknown or the path `climbs`."""
    if not options.label_studio_url:
        raise ImageError(
            "The image is stored in Label Studio, and its address is not known.",
            "Set LABEL_STUDIO_URL, and LABEL_STUDIO_API_KEY to a personal access token.",
            400,
        )
    route, _, query = path.partition("?")
    if climbs(route, query):
        raise climbing()
    return options.label_studio_url.rstrip("/") + path


def climbs(route: str, query: str) -> bool:
    """Whether a path or a value of its query leads up, however often it is encoded: a server in between may decode."""
    for sent in (route, *(value for values in parse_qs(query).values() for value in values)):
        value, plain = sent, unquote(sent)
        while plain != value:
            value, plain = plain, unquote(plain)
        if ".." in value.replace("\\", "/").split("/"):
            return True
    return False


def climbing() -> ImageError:
    """The refusal of what `climbs`."""
    return ImageError("The image path climbs out of its folder.", "Remove the .. from the task's data.", 403)


def resolve_route(ref: ImageRef, url: str, options: RuntimeOptions) -> str:
    """Label Studio's route that hands out a cloud object of the task's (or project's) storages. Raises ImageError where
    neither is known."""
    encoded = base64.urlsafe_b64encode(url.encode()).decode()
    if ref.task is not None:
        return label_studio_url(f"/tasks/{ref.task}/resolve/?fileuri={encoded}", options)
    if ref.project is not None:
        return label_studio_url(f"/projects/{ref.project}/resolve/?fileuri={encoded}", options)
    raise ImageError(
        f"A {url.partition(':')[0]}: image is read through Label Studio, which needs its task.",
        "Open it from a task, or give an http(s) URL.",
        400,
    )
