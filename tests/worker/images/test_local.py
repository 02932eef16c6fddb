"""What a task may try to read from the disk: only what lies in the stated folders is to be had, and seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.worker.conftest import PICTURE, options, refused
from worker.contract import ImageRef
from worker.images import fetch, local


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder that may be read and one that may not."""
    root, outside = tmp_path / "root", tmp_path / "root-secret"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (root / "sub" / "a.png").write_bytes(PICTURE)
    (outside / "a.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "folder").symlink_to(outside)
    (root / "up").symlink_to("..")
    (root / "chain").symlink_to("folder")
    (root / "relative.png").symlink_to("../root-secret/a.png")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe.png")
    return root, outside


@pytest.mark.parametrize(
    "path",
    [
        "{outside}/a.png",
        "{root}/../root-secret/a.png",
        "{root}/sub/../../root-secret/a.png",
        "{root}/./../root-secret/a.png",
        "{root}//../root-secret/a.png",
        "{root}-secret/a.png",
        "{root}/link.png",
        "{root}/relative.png",
        "{root}/folder/a.png",
        "{root}/chain/a.png",
        "{root}/up/root-secret/a.png",
        "{root}/loop",
        "{root}/sub",
        "{root}",
        "{root}/pipe.png",
        "{root}/sub/a.png/",
        "{root}/sub/a.png\0.jpg",
        "{root}/sub/../../../../../../etc/passwd",
        "file://{root}/../root-secret/a.png",
        "file://{root}/%2e%2e/root-secret/a.png",
        "file://{root}/sub/%2e%2e%2f%2e%2e/root-secret/a.png",
        "file://{root}/..%00/a.png",
        "file://elsewhere{root}/sub/a.png",
        "/data/local-files/../..{outside}/a.png",
        "~/a.png",
        "sub/a.png",
        "./sub/a.png",
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/root/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
    ],
)
def test_nothing_outside_of_the_stated_folders_is_read(folders: tuple[Path, Path], path: str) -> None:
    root, outside = folders
    allowed = options(local_roots=(root,))
    assert fetch.fetch(ImageRef(url=f"{root}/sub/a.png"), allowed) == PICTURE
    url = path.format(root=root, outside=outside)
    if path.endswith("a.png/"):  # the same file, said with a slash too many
        assert fetch.fetch(ImageRef(url=url), allowed) == PICTURE
        return
    assert refused(url, allowed).status in (400, 403, 404)


def test_a_folder_that_becomes_a_link_in_between_is_not_followed(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = folders
    open_beneath = local._open_beneath

    def bend(start: Path, real: Path) -> int:
        (root / "sub").rename(root / "moved")
        (root / "sub").symlink_to(outside)
        return open_beneath(start, real)

    monkeypatch.setattr(local, "_open_beneath", bend)
    assert refused(f"{root}/sub/a.png", options(local_roots=(root,))).status == 404


def test_whether_a_file_outside_exists_does_not_show(folders: tuple[Path, Path]) -> None:
    root, outside = folders
    allowed = options(local_roots=(root,))
    there, not_there = (refused(f"{outside}/{name}", allowed) for name in ("a.png", "b.png"))
    assert there.status == not_there.status
    assert there.error.replace("a.png", "") == not_there.error.replace("b.png", "")
