"""How much longer a click takes when the request carries 200 drafts with masks: `python scripts/measure_request.py`.

Serves the real application with `tiny` as `bald-sam serve` does, sends the same click in turn with and without the
drafts, and prints the medians and their ratio. `--stock` uses waitress' own buffer sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from evaluation.scenes import draw
from ml_backend import processes
from ml_backend.labeling_config import recommended_config
from worker import brush_rle

HEIGHT, WIDTH, DRAFTS, ROUNDS = 1200, 1800, 200, 25
STOCK = "import waitress; m = waitress.create_server; waitress.create_server = lambda *a, **k: m(*a, **{**k, "
STOCK += "'recv_bytes': 8192, 'inbuf_overflow': 524288}); "


def bodies(image: Path, rle: list[int]) -> tuple[bytes, bytes]:
    """The same click twice: alone, and with the drafts."""
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    click = {"x": 50.0, "y": 50.0, "width": 0.5, "labels": []}
    prompt = {**size, "value": click, "is_positive": True, "id": "p", "from_name": "kp", "to_name": "image"}
    config = recommended_config(["Object"])
    prompt |= {"type": "keypoint", "origin": "manual"}
    body: dict[str, Any] = {
        "tasks": [{"id": 1, "data": {"image": str(image)}, "drafts": []}],
        "project": "1.1",
        "label_config": config,
        "params": {"context": {"result": [prompt]}},
    }
    region = {**size, "from_name": "brush", "to_name": "image", "type": "brushlabels"}
    region |= {"value": {"format": "rle", "rle": rle, "brushlabels": ["Object"]}}
    full = copy.deepcopy(body)
    full["tasks"][0]["drafts"] = [
        {"id": n, "user": "a@b.c", "result": [{**region, "id": f"m{n}"}]} for n in range(DRAFTS)
    ]
    return json.dumps(body).encode(), json.dumps(full).encode()


def main() -> None:
    """Serve, click in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true")
    stock = parser.parse_args().stock
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "scene.png"
        scene = draw(3, (HEIGHT, WIDTH))
        Image.fromarray(scene.image).save(image)
        bare, full = bodies(image, brush_rle.encode(scene.labels == 1))
        port = processes.free_port()
        program = (STOCK if stock else "") + f"from ml_backend.cli import main; main(['serve', '--port', '{port}'])"
        own = {"BALD_SAM_DATA_DIR": folder, "BALD_SAM_LOCAL_ROOTS": folder, "BALD_SAM_REDIS_URL": ""}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], env=os.environ | own, **quiet) as server:
            try:
                url = f"http://127.0.0.1:{port}"
                while not _ready(url):
                    time.sleep(0.2)
                _click(url, bare), _click(url, full)
                times = [(_click(url, bare), _click(url, full)) for _ in range(ROUNDS)]
            finally:
                server.terminate()
    alone, loaded = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"request of {len(bare)} bytes {alone:.0f} ms, of {len(full)} bytes {loaded:.0f} ms, ratio {loaded / alone:.2f}"
    )


def _ready(url: str) -> bool:
    try:
        return bool(requests.get(f"{url}/health", timeout=1).json()["ready"])
    except requests.RequestException:
        return False


def _click(url: str, body: bytes) -> float:
    began = time.perf_counter()
    answer = requests.post(f"{url}/predict", data=body, headers={"Content-Type": "application/json"}, timeout=60)
    answer.raise_for_status()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
