"""Train the shipped backbone `tiny` from scratch: see docs/tiny.md.

    python scripts/train_tiny.py --data POOL --teacher resnet50v2_c4.safetensors --minutes 95

Started again after a kill, the same command goes on from its last checkpoint. `--steps` instead of `--minutes` makes
the run a function of its seed alone. On two cores, two processes of one thread each are twice as fast as one:

    python -m torch.distributed.run --nproc-per-node 2 -- scripts/train_tiny.py --threads 1 ...

Without `--data` it learns from drawn scenes only, without `--teacher` from masks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import cv2
import torch
from tiny import parallel
from tiny.clicks import Clickers
from tiny.curve import plot_curve
from tiny.pool import Pool, pack
from tiny.teacher import prepare
from tiny.training import Run

HERE = Path(__file__).parent
BASE = HERE / "tiny" / "config.toml"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of SET/images, SET/labels, SET/metadata.json; or one packed before"
    )
    parser.add_argument("--pack-only", action="store_true", help="pack the pool into --folder and end")
    parser.add_argument("--teacher", type=Path, help="weights of the frozen teacher, its loader (.py) beside them")
    parser.add_argument("--config", type=Path, default=BASE, help="what is to differ from tiny/config.toml")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "bald-sam" / "train-tiny",
                        help="packed pool, checkpoint and log of the run (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE.parent / "worker" / "weights" / "tiny.safetensors")
    parser.add_argument(
        "--start", type=Path, help="go on from these weights of an earlier run, without decoder warm-up"
    )
    parser.add_argument("--curve", type=Path, help="also plot the log to this picture")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare samples; 0 for none")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="length of the run in minutes of computing")
    length.add_argument("--steps", type=int, help="length of the run in steps")
    parser.add_argument("--export-only", action="store_true", help="write the averaged weights of the last checkpoint")
    options = parser.parse_args(arguments)
    if not options.pack_only and options.minutes is None and options.steps is None:
        parser.error("say how long with --minutes or --steps")
    return options


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of `BASE` with the values of `path` instead of its own."""
    config, own = tomllib.loads(BASE.read_text()), tomllib.loads(path.read_text())
    return config | {key: config[key] | value if isinstance(value, dict) else value for key, value in own.items()}


def main() -> int:
    """Pack, prepare the teacher, train, export; returns the exit status."""
    options = parse()
    config = read_config(options.config)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(0)  # its pool costs more than it gives on masks this small
    torch.set_flush_denormal(True)  # denormals in early training cost a CPU a multiple of the time
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    try:
        with parallel.together():
            return prepare_and_train(options, config, device)
    except (ValueError, OSError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 2


def prepare_and_train(options: argparse.Namespace, config: dict[str, Any], device: torch.device) -> int:
    """Of several processes the first prepares and writes. Returns the exit status."""
    folder, first = options.folder, not parallel.rank()
    if first and not (folder / "pool.json").exists():
        print("packing the pool", flush=True)
        pack(options.data, folder, config["pool"], max(options.workers, 1))
    if options.pack_only:
        return 0
    if first and options.teacher and not (folder / "teacher.safetensors").exists():
        prepare(Pool(folder), options.teacher, folder, config["teacher"]["channels"], device)
    parallel.first_says(0.0)  # the others wait for what the first prepares
    clickers = Clickers(options.workers if device.type == "cuda" else 0)  # on a CPU they would take what training needs
    run = Run(config, folder, device=device, steps=options.steps, minutes=options.minutes, start=options.start,
              clickers=clickers)  # fmt: skip
    if not options.export_only:
        run.train(workers=options.workers, say=lambda text: print(text, flush=True))
    if first:
        run.export(options.out)
        if options.curve:
            plot_curve(folder / "log.jsonl", options.curve)
        print(f"wrote {options.out} at step {run.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
