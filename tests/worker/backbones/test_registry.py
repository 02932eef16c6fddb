from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT

from worker.backbones import BACKBONES, build
from worker.backbones.checkpoints import Checkpoint, CheckpointError, checkpoint_path, download
from worker.backbones.fast_attention import fused_attention

BODY = bytes(range(256)) * 20_000


class _Handler(BaseHTTPRequestHandler):
    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[start:])

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    _Handler.ranges.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/weights.pth"
        server.shutdown()
        thread.join()


def _checkpoint(url: str, body: bytes = BODY) -> Checkpoint:
    return Checkpoint("weights.pth", url, len(body), hashlib.sha256(body).hexdigest(), "none")


def test_download_resumes_and_verifies(url: str, tmp_path: Path) -> None:
    checkpoint = _checkpoint(url)
    part = checkpoint_path(checkpoint, tmp_path).with_name("weights.pth.part")
    part.parent.mkdir()
    part.write_bytes(BODY[:1000])
    path = download(checkpoint, tmp_path)
    assert path.read_bytes() == BODY
    assert _Handler.ranges == ["bytes=1000-"]
    assert download(checkpoint, tmp_path) == path  # nothing is fetched twice
    assert len(_Handler.ranges) == 1
    assert not part.exists()


@pytest.mark.parametrize("other", [BODY[:-1] + b"x", BODY[:-7]])
def test_download_refuses_other_bytes(url: str, tmp_path: Path, other: bytes) -> None:
    with pytest.raises(CheckpointError, match="not the published"):
        download(_checkpoint(url, other), tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_build_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Choose one of: tiny, mobile_sam"):
        build("sam3")
    with pytest.raises(CheckpointError, match="bald-sam models download vit_b"):
        build("vit_b", data_dir=tmp_path)
    with pytest.raises(CheckpointError, match="Check the path"):
        build("vit_b", checkpoint=tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="auto or cpu"):
        build("tiny", device="warp")


def test_build_refuses_a_wrong_file(tmp_path: Path) -> None:
    spec = BACKBONES["mobile_sam"]
    assert spec.checkpoint is not None
    path = checkpoint_path(spec.checkpoint, tmp_path)
    path.parent.mkdir()
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="SHA-256"):
        build("mobile_sam", data_dir=tmp_path)
    with pytest.raises(CheckpointError, match="does not hold weights of mobile_sam"):
        build("mobile_sam", checkpoint=path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="does not hold weights"):
        build("mobile_sam", checkpoint=path)


def test_own_weights_load_strictly_and_name_the_backbone(tmp_path: Path) -> None:
    made = build("mobile_sam", random_weights=True, seed=3, device="cpu")
    torch.save(made.sam.state_dict(), tmp_path / "own.pt")
    loaded = build("mobile_sam", checkpoint=tmp_path / "own.pt", device="cpu")
    digest = hashlib.sha256((tmp_path / "own.pt").read_bytes()).hexdigest()
    assert loaded.id == f"mobile_sam-{digest[:12]}"
    torch.testing.assert_close(loaded.sam.state_dict(), made.sam.state_dict(), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.sam.parameters())


def test_random_weights_are_seeded_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (build("tiny", random_weights=True, seed=seed, device="cpu") for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weight = "mask_decoder.iou_token.weight"
    assert torch.equal(one.sam.state_dict()[weight], same.sam.state_dict()[weight])
    assert not torch.equal(one.sam.state_dict()[weight], other.sam.state_dict()[weight])
    assert one.id == same.id != other.id


def test_tiny_ships_with_the_package() -> None:
    assert build("tiny", device="cpu").id.startswith("tiny-")


@pytest.mark.parametrize("window", [0, 3])
def test_fused_attention_equals_the_published_one(window: int) -> None:
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=64, embed_dim=32, depth=1, num_heads=4, out_chans=8, use_rel_pos=True, window_size=window
    )
    attention = encoder.blocks[0].attn
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, 4 if window == 0 else 3, 4 if window == 0 else 3, 32)
    with torch.no_grad():
        torch.testing.assert_close(partial(fused_attention, attention)(x), attention(x), rtol=1e-5, atol=1e-6)
