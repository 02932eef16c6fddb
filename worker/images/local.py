"""Bytes of images that no network is needed for: files under the stated folders, and data: URLs."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from urllib.parse import unquote

from worker.contract import RuntimeOptions
from worker.images.errors import ImageError


def too_large(options: RuntimeOptions) -> ImageError:
    """The refusal of an image of more than `options.max_image_mb`."""
    return ImageError(
        f"The image is larger than {options.max_image_mb} MB.",
        "Use a smaller image, or raise BALD_SAM_MAX_IMAGE_MB.",
        413,
    )


def inline(url: str, options: RuntimeOptions) -> bytes:
    """Bytes of a base64 data: URL. Raises ImageError."""
    head, _, body = url.partition(",")
    if len(body) > (options.max_image_mb << 20) * 4 // 3 + 4:
        raise too_large(options)
    try:
        if not head.endswith(";base64"):
            raise ValueError(head)
        return base64.b64decode(unquote(body), validate=True)
    except (ValueError, binascii.Error):
        raise ImageError("The data: URL holds no base64 image.", "Upload the picture as a file.", 400) from None


def local(name: str, options: RuntimeOptions) -> bytes:
    """Bytes of a regular file that lies, links followed, under one of the roots. Raises ImageError."""
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
