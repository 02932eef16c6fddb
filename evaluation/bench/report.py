"""The figures of a run as a page: tables, goals, and one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from evaluation.plots import COLOURS

mpl.use("Agg")
#: What lies between these lines belongs to the command; everything else on the page is kept.
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLE = "# Speed: what was measured\n"
PICTURE = "performance.png"
WAYS = ("embedded", "rq", "decoder", "stock")
#: Stages of a click in their order; `http_and_json` is what is left of the request.
STAGES = ("fetch", "look_up", "embedding", "zoom", "decode", "propose", "mask", "rle", "http_and_json")


def write(found: dict[str, Any], path: Path) -> None:
    """Write tables and a picture of `found`, what `bald-sam bench --json` holds, into the page `path`.

    Only the part between `BEGIN` and `END` is replaced. The picture goes to the folder `images` beside the page's
    folder if there is one, else beside the page.
    """
    images = path.parent.parent / "images"
    folder = images if images.is_dir() else path.parent
    picture = folder / PICTURE
    lines = [BEGIN, *_tables(found)]
    if draw(found, picture):
        where = f"../images/{PICTURE}" if folder == images else PICTURE
        lines += ["", f"![Clicks by stage, annotators at once, memory]({where})"]
    text = path.read_text() if path.exists() else TITLE
    head, begin, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END) if begin else ("", "", "")
    path.write_text(
        f"{head.rstrip()}\n\n" + "\n".join([*lines, END]) + (f"\n\n{tail.strip()}\n" if tail.strip() else "\n")
    )


def _tables(found: dict[str, Any]) -> Iterator[str]:
    for part, where in found.get("measured_on", {}).items():
        quick = ", quick" if "quick" in where else ""
        yield f"`{part}`: {where['device']}, PyTorch {where['torch']}, {where['date']}{quick}.  "
    for key, table in _PARTS.items():
        if found.get(key):
            yield ""
            yield from table(found)


def _click(found: dict[str, Any]) -> Iterator[str]:
    yield from _header("a click, ms", *(f"{way}, p50 / p95" for way in WAYS))
    for backbone, sizes in found["click"].items():
        for size, ways in sizes.items():
            cells = (f"{ways[way]['p50']:.0f} / {ways[way]['p95']:.0f}" if way in ways else "-" for way in WAYS)
            yield _row(f"`{backbone}`, {size}", *cells)
    yield ""
    yield from _header(
        "ratio of medians within a click",
        "request / decoder",
        "stock / request",
        "RQ more, ms",
        "proposal / decoder",
        "proposal / own decode",
    )
    yield _row("goal, `vit_b` at 4000x3000", "<= 1.25", ">= 2", "<= 10", "<= 0.1", "")
    for backbone, sizes in found.get("click_ratio", {}).items():
        for size, one in sizes.items():
            names = (
                "request_to_decoder",
                "stock_to_request",
                "rq_more_ms",
                "proposal_to_decoder",
                "proposal_to_own_decode",
            )
            yield _row(f"`{backbone}`, {size}", *(str(one.get(name, "-")) for name in names))
    yield ""
    yield from _header("stages of the embedded click, p50 ms", *STAGES)
    for backbone, sizes in found.get("stages", {}).items():
        for size, stages in sizes.items():
            yield _row(f"`{backbone}`, {size}", *(f"{stages[s]['p50']:.1f}" if s in stages else "-" for s in STAGES))


def _concurrency(found: dict[str, Any]) -> Iterator[str]:
    counts = found["concurrency"]
    single = counts.get("1", {}).get("p50")
    yield from _header(
        "annotators", "clicks", "p50, ms", "p95, ms", "p95 / p50 of one (goal <= 10)", "fairness (goal <= 1.5)"
    )
    for count, one in counts.items():
        tail = f"{one['p95'] / single:.1f}" if single else "-"
        yield _row(count, one["n"], f"{one['p50']:.0f}", f"{one['p95']:.0f}", tail, one["fairness"])


def _background(found: dict[str, Any]) -> Iterator[str]:
    one = found["background"]
    yield from _header("clicks over RQ beside a batch on the same worker", "idle", "busy")
    yield _row(
        "p50, p95, p99, ms", *(", ".join(f"{one[w][p]:.0f}" for p in ("p50", "p95", "p99")) for w in ("idle", "busy"))
    )
    yield _row("more at the median, in encodes of an image (goal <= 1)", "", one["added_p50_encodes"])
    yield _row("more at worst, in encodes", "", one["added_max_encodes"])


def _batch(found: dict[str, Any]) -> Iterator[str]:
    yield from _header("batch", "images / s", "bare encode and decode", "ratio (goal >= 0.9)")
    for backbone, one in found["batch"].items():
        yield _row(f"`{backbone}`", one["images_s"], one.get("loop_images_s", "-"), found["batch_ratio"][backbone])


def _rle(found: dict[str, Any]) -> Iterator[str]:
    rle = found["rle"]
    yield from _header("RLE of 12 megapixels", "ours, ms", "the SDK, ms", "ratio", "goal")
    for name, goal, words in (("", "0.1", "clean mask"), ("_specks", "0.15", "1 % specks")):
        for verb in ("encode", "decode"):
            if f"{verb}_ratio{name}" in rle:
                cells = (rle[f"{verb}_{key}{name}"] for key in ("ms", "sdk_ms", "ratio"))
                yield _row(f"{verb}, {words}", *cells, f"<= {goal}")


def _cold(found: dict[str, Any]) -> Iterator[str]:
    cold = found["cold"]
    yield from _header("start", "s")
    for key, words in (
        ("import_s", "`import ml_backend`"),
        ("help_s", "`bald-sam --help`"),
        ("import_app_s", "`import ml_backend.app`"),
    ):
        if key in cold:
            yield _row(words, cold[key])
    yield ""
    yield from _header(
        "first clicks",
        "listens, s",
        "ready, s",
        "not opened, ms",
        "opened before, ms",
        "warm, ms",
        "opened / warm (goal <= 1.2)",
    )
    for backbone, one in cold.items():
        if isinstance(one, dict):
            names = (
                "listening_s",
                "ready_s",
                "first_click_unopened_ms",
                "first_click_opened_ms",
                "warm_click_ms",
                "first_click_ratio",
            )
            yield _row(f"`{backbone}`", *(one[name] for name in names))


def _encoder(found: dict[str, Any]) -> Iterator[str]:
    yield from _header("encoder", "s", "speed-up", "relative error", "IoU of masks", "to start, s")
    for backbone, ways in found["encoder"].items():
        for way, one in ways.items():
            if "left_out" in one:
                yield _row(f"`{backbone}`, {way}", f"left out: {one['left_out']}", "", "", "", "")
                continue
            name = f"`{backbone}`, **{way}** (in use)" if one.get("chosen") else f"`{backbone}`, {way}"
            cells = f"{one['seconds']:.3g}", one["speed_up"], f"{one['relative_error']:.1e}", one["mask_iou"]
            yield _row(name, *cells, one.get("start_s", "-"))


def _memory(found: dict[str, Any]) -> Iterator[str]:
    one = found["memory"]
    yield from _header("memory", "")
    yield _row(
        f"{one['clicks']} clicks on {one['images']} images of `{one['backbone']}`, resident", f"{one['resident_mb']} MB"
    )
    yield _row("slope after warm-up (goal < 1 MB)", f"{one['slope_mb_per_100_images']} MB each 100 images")
    yield _row(f"a cached image, of {one['cache_mb']} MB of cache", f"{one['mb_per_cached_image']} MB")


_PARTS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "click": _click,
    "concurrency": _concurrency,
    "background": _background,
    "batch": _batch,
    "rle": _rle,
    "cold": _cold,
    "encoder": _encoder,
    "memory": _memory,
}


def draw(found: dict[str, Any], path: Path) -> bool:
    """A picture of stages, annotators and memory, of those that were measured; whether there was any to draw."""
    panels = [
        (key, panel)
        for key, panel in (("stages", _stages), ("concurrency", _annotators), ("memory", _curve))
        if found.get(key)
    ]
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (_, panel) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        panel(axes, found)
    figure.savefig(path, dpi=80)
    return True


def _stages(axes: Any, found: dict[str, Any]) -> None:
    bars = [
        (f"{backbone}\n{size}", stages) for backbone, sizes in found["stages"].items() for size, stages in sizes.items()
    ]
    bottom = [0.0] * len(bars)
    for stage, colour in zip(STAGES, (*COLOURS, "#7F3C8D"), strict=True):
        heights = [stages[stage]["p50"] if stage in stages else 0.0 for _, stages in bars]
        if any(heights):
            axes.bar(range(len(bars)), heights, bottom=bottom, label=stage, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes.set_ylabel("ms")
    axes.set_title("A click by stage (p50)", fontsize=9)
    axes.legend(fontsize=6)


def _annotators(axes: Any, found: dict[str, Any]) -> None:
    counts = found["concurrency"]
    for name, colour in zip(("p50", "p95"), COLOURS, strict=False):
        axes.plot(
            [int(count) for count in counts], [one[name] for one in counts.values()], "o-", label=name, color=colour
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("annotators")
    axes.set_ylabel("ms")
    axes.set_title("Annotators at once", fontsize=9)
    axes.legend(fontsize=7)


def _curve(axes: Any, found: dict[str, Any]) -> None:
    one = found["memory"]
    axes.plot([number for number, _ in one["curve"]], [mb for _, mb in one["curve"]], color=COLOURS[0])
    axes.axvline(one["warm_up_images"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images clicked on")
    axes.set_ylabel("resident MB")
    axes.set_title("Memory", fontsize=9)


def _header(*cells: Any) -> Iterator[str]:
    yield _row(*cells)
    yield "|---" * len(cells) + "|"


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
