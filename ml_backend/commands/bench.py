"""`bald-sam bench`: times as ratios, measured in one run."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import click

from ml_backend.cli import fail

#: What can be measured, in this order.
PARTS = ("rle", "cold", "click", "concurrency", "batch", "encoder", "memory")


@click.command()
@click.option("--only", default=",".join(PARTS), show_default=True, help="Comma-separated parts.")
@click.option("--backbones", default="tiny", show_default=True, help="Comma-separated; random weights but for tiny.")
@click.option("--sizes", help="Comma-separated; of the images that clicks are timed on. All without it.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="Few rounds: to see that it runs, not to quote.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Add the figures to this file.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all figures into this page; what is not between its `measured` marks is kept.",
)
def bench(
    only: str, backbones: str, sizes: str | None, device: str, quick: bool, path: Path | None, report: Path | None
) -> None:
    """Measure clicks by stage, batches, RLE, annotators at once, memory and start-up.

    Every part compares in turn within one run with what cannot be quicker (the bare decoder or encoder) or with the
    stock way. Parts may be measured in several runs into one --json file, where a run's figures of a backbone take the
    place of earlier ones, all sizes together; --only "" measures nothing and writes the --report of that file.
    """
    from evaluation.bench.setup import SIZES, Bench, machine
    from ml_backend.labeling_config import recommended_config
    from worker.backbones import BACKBONES

    parts, names, chosen = (
        [name.strip() for name in text.split(",") if name.strip()]
        for text in (only, backbones, sizes or ",".join(SIZES))
    )
    every = (("part", parts, PARTS), ("backbone", names, tuple(BACKBONES)), ("size", chosen, tuple(SIZES)))
    for word, given, choices in every:
        if unknown := [name for name in given if name not in choices]:
            fail(f"There is no {word} {', '.join(unknown)}; there are {', '.join(choices)}.")
    found = _read(path)

    def note(part: str, measured: dict[str, Any]) -> None:
        for key, value in measured.items():
            before = found.get(key)
            found[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
        found.setdefault("measured_on", {})[part] = machine(device) | ({"quick": "yes"} if quick else {})
        if path is not None:
            path.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="bald-sam-bench-") as folder:
        run = Bench(
            backbones=tuple(names),
            sizes=tuple(chosen),
            device=device,
            quick=quick,
            folder=Path(folder),
            label_config=recommended_config(["Object"]),
            say=lambda text: click.echo(text, err=True),
            note=note,
        )
        with run.running:
            for part in sorted(parts, key=PARTS.index):
                note(part, importlib.import_module(f"evaluation.bench.{part}").measure(run))
    if report is not None:
        from evaluation.bench.report import write

        write(found, report)
    click.echo(json.dumps(found, indent=1))


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read ({error}). Give --json another file.")
    if not isinstance(found, dict):
        fail(f"{path} does not hold figures of `bald-sam bench`. Give --json another file.")
    return found
