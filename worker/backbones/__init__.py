"""Registry of the frozen promptable models: how each is built and which weights it takes."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor, nn

from worker.backbones.checkpoints import Checkpoint, CheckpointError, checkpoint_path, file_sha256
from worker.backbones.fast_attention import accelerate
from worker.backbones.fast_decoder import FastDecoder
from worker.backbones.fast_encoder import fast_encoder
from worker.backbones.graphed_decoder import GraphedDecoder
from worker.backbones.mobile_sam import build_mobile_sam
from worker.backbones.tiny import GRAIN, build_tiny, load_tiny
from worker.precision import encoder_precision

TINY_WEIGHTS = Path(__file__).parent.parent / "weights" / "tiny.safetensors"
META = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/"


@dataclass(frozen=True)
class BackboneSpec:
    """A kind of backbone. `checkpoint` is None for the one whose weights ship with this package. `zoom`: whether it
    looks at parts of an image unless told otherwise, see `worker.zoom`; that costs an encode now and then. `grain`: its
    encoder takes any input whose sides are multiples of this; None for those that must see the padded square.
    `guided`: borders of its masks are moved to the image's, see `worker.guided_filter`; whether the published ones'
    would gain is not known, as their weights were not at hand.
    `bears_half`: its masks are as good with an encoder of 16 bits: the ViTs', as others run them, `tiny`'s, which was
    trained so (docs/results/performance.md); `mobile_sam`'s weights were not at hand to be tried."""

    name: str
    builder: Callable[[], Sam]
    checkpoint: Checkpoint | None
    source: str
    zoom: bool = False
    grain: int | None = None
    guided: bool = False
    bears_half: bool = True


@dataclass
class Backbone:
    """A frozen model, ready to run. `id` names its exact weights: `<name>-<12 hex digits of their SHA-256>`.

    `precision`: 16-bit type of the image encoder, None for float32. `zoom`: whether later clicks are decoded on the
    part of the image that holds the object. `grain`: of sides that inputs are padded to, None to pad to the square.
    `guided`: whether borders of masks are moved to the image's.
    """

    name: str
    sam: Sam
    device: torch.device
    id: str
    precision: torch.dtype | None = None
    zoom: bool = False
    grain: int | None = None
    guided: bool = False

    @property
    def embedding_id(self) -> str:
        """Names what embeddings depend on beside the image: the weights, and the number type of the encoder."""
        return self.id if self.precision is None else f"{self.id}-{str(self.precision).removeprefix('torch.')}"

    @cached_property
    def dense_pe(self) -> Tensor:
        """Positional encoding of the embedding's grid, float32 (1, C, h, w); the same for every image."""
        with torch.no_grad():
            encoding: Tensor = self.sam.prompt_encoder.get_dense_pe()
            return encoding

    @cached_property
    def encoder(self) -> nn.Module:
        """The image encoder, quicker where that is possible."""
        return fast_encoder(self.sam.image_encoder, self.device)

    @cached_property
    def decoder(self) -> FastDecoder | GraphedDecoder:
        """The mask decoder, quicker."""
        fast = FastDecoder(self.sam.mask_decoder, self.dense_pe)
        return GraphedDecoder(fast) if self.device.type == "cuda" else fast

    @property
    def image_size(self) -> int:
        """Side of the padded square input, pixels."""
        return int(self.sam.image_encoder.img_size)

    @property
    def stride(self) -> int:
        """Pixels of the input to a cell of the embedding."""
        return self.image_size // int(self.sam.prompt_encoder.image_embedding_size[0])

    def padded_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """What an image resized to `input_size` is padded to, both (height, width) in pixels.

        Padding costs as much as image: where the encoder does not need the square, it is left out.
        """
        if self.grain is None:
            return self.image_size, self.image_size
        height, width = (-(-length // self.grain) * self.grain for length in input_size)
        return height, width


BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            "tiny", build_tiny, None, "trained by this project; ships with it", zoom=True, grain=GRAIN, guided=True
        ),
        BackboneSpec(
            "mobile_sam",
            build_mobile_sam,
            Checkpoint(
                "mobile_sam.pt",
                MOBILE + "mobile_sam.pt",
                40_728_226,
                "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
                "Apache-2.0",
            ),
            "MobileSAM, Zhang et al. 2023 (arXiv 2306.14289)",
            bears_half=False,
        ),
        BackboneSpec(
            "vit_b",
            sam_model_registry["vit_b"],
            Checkpoint(
                "sam_vit_b_01ec64.pth",
                META + "sam_vit_b_01ec64.pth",
                375_042_383,
                "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
                "Apache-2.0",
            ),
            "Segment Anything, Kirillov et al. 2023 (arXiv 2304.02643)",
        ),
        BackboneSpec(
            "vit_l",
            sam_model_registry["vit_l"],
            Checkpoint(
                "sam_vit_l_0b3195.pth",
                META + "sam_vit_l_0b3195.pth",
                1_249_524_607,
                "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
                "Apache-2.0",
            ),
            "Segment Anything, Kirillov et al. 2023 (arXiv 2304.02643)",
        ),
        BackboneSpec(
            "vit_h",
            sam_model_registry["vit_h"],
            Checkpoint(
                "sam_vit_h_4b8939.pth",
                META + "sam_vit_h_4b8939.pth",
                2_564_550_879,
                "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
                "Apache-2.0",
            ),
            "Segment Anything, Kirillov et al. 2023 (arXiv 2304.02643)",
        ),
    )
}


def build(
    name: str,
    *,
    checkpoint: Path | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    precision: str = "float32",
    zoom: str = "auto",
    random_weights: bool = False,
    seed: int = 0,
) -> Backbone:
    """Build a backbone, frozen and in evaluation mode, on its device.

    `checkpoint`: weights of the same architecture from elsewhere (a fine-tuned model); any hash is accepted, unknown or
    missing tensors are not. Without it the published file is taken from `data_dir`/checkpoints and must have the
    published SHA-256. `precision`: of the encoder, see `worker.precision`. `zoom`: on, off, or auto, which suits the
    backbone. `random_weights`: seeded noise of the real architecture, for tests and benchmarks.
    Raises ValueError (unknown name, device or precision) or CheckpointError, both saying what to do.
    """
    if name not in BACKBONES:
        raise ValueError(f"There is no backbone called {name!r}. Choose one of: {', '.join(BACKBONES)}.")
    target = resolve_device(device)
    spec = BACKBONES[name]
    if random_weights:
        sam, digest = _random(spec, seed), hashlib.sha256(f"random seed {seed}".encode()).hexdigest()
    else:
        path = checkpoint or _published_path(spec, data_dir)
        sam, digest = _load(spec, path, published=checkpoint is None)
    sam.requires_grad_(False)
    accelerate(sam)
    encoder = encoder_precision(precision, target, bears_half=spec.bears_half)
    # A GPU wants few shapes: its decoder is recorded for the square, and starting kernels costs more than padding.
    grain = spec.grain if target.type != "cuda" else None
    sam, own_id = sam.to(target).eval(), f"{name}-{digest[:12]}"
    return Backbone(name, sam, target, own_id, encoder, zooms(name, zoom), grain, spec.guided)


def zooms(name: str, zoom: str) -> bool:
    """Whether a backbone looks at parts of an image, with `zoom` on, off, or auto, which suits it."""
    return zoom == "on" or (zoom == "auto" and name in BACKBONES and BACKBONES[name].zoom)


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used here. Set the device to auto or cpu.") from error
    return chosen


def _published_path(spec: BackboneSpec, data_dir: Path | None) -> Path:
    if spec.checkpoint is None:
        return TINY_WEIGHTS
    path = checkpoint_path(spec.checkpoint, data_dir) if data_dir else None
    if path is None or not path.exists():
        raise CheckpointError(
            f"The weights of {spec.name} are not on this machine. Run `bald-sam models download {spec.name}`, "
            "or pass the path of the file as the checkpoint."
        )
    return path


def _load(spec: BackboneSpec, path: Path, *, published: bool) -> tuple[Sam, str]:
    if not path.is_file():
        raise CheckpointError(f"There is no weights file at {path}. Check the path of the checkpoint.")
    digest = file_sha256(path)
    if spec.checkpoint is None:
        try:
            return load_tiny(path), digest
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    if published and digest != spec.checkpoint.sha256:
        raise CheckpointError(
            f"{path} is not the published {spec.checkpoint.file}: its SHA-256 is {digest[:12]}..., not "
            f"{spec.checkpoint.sha256[:12]}.... Delete it and run `bald-sam models download {spec.name}`; to use your "
            "own weights, pass their path as the checkpoint."
        )
    sam = spec.builder()
    try:
        sam.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} does not hold weights of {spec.name}: {reason}") from error
    return sam, digest


def _random(spec: BackboneSpec, seed: int) -> Sam:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = spec.builder()
        # Position tables start at zero in the published code; noise makes every part of the computation count.
        for name, parameter in sam.image_encoder.named_parameters():
            if name.endswith(("rel_pos_h", "rel_pos_w", "pos_embed", "attention_biases")):
                nn.init.trunc_normal_(parameter, std=0.02)
    return sam
