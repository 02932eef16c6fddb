"""What the demo labels: photographs that scikit-image's wheel carries, drawn scenes, or a folder of the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

#: In the order in which the annotator meets them: easy and colourful first.
PHOTOGRAPHS = (
    "chelsea.png",
    "rocket.jpg",
    "coffee.png",
    "astronaut.png",
    "motorcycle_left.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
)
#: (kind, seed) of `evaluation.scenes`.
SCENES = (("objects", 3), ("holes", 5), ("parts", 8), ("thin", 4))
SCENE_SIZE = (480, 640)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def sample_pictures(folder: Path) -> list[Path]:
    """Put the sample pictures into `folder` (those that are not there yet); return them in labelling order.

    Raises ModuleNotFoundError when scikit-image or the package of the scenes is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name in PHOTOGRAPHS:
        target = folder / name
        if not target.exists():
            target.write_bytes((resources.files("skimage") / "data" / name).read_bytes())
        pictures.append(target)
    for kind, seed in SCENES:
        target = folder / f"drawn-{kind}.png"
        if not target.exists():
            _draw(target, kind, seed)
        pictures.append(target)
    return pictures


def pictures_in(folder: Path) -> list[Path]:
    """The images directly in `folder`, by name. Raises FileNotFoundError when there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise FileNotFoundError(f"There is no image in {folder} (looked for {', '.join(sorted(SUFFIXES))}).")
    return found


def _draw(target: Path, kind: str, seed: int) -> None:
    from PIL import Image

    from evaluation.scenes import draw

    Image.fromarray(draw(seed, SCENE_SIZE, kind).image).save(target)
