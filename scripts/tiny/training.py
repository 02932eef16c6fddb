"""The training run: optimiser, schedule, averaged weights, checkpoints."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tiny import parallel
from tiny.clicks import Clickers
from tiny.pool import Pool
from tiny.samples import Samples
from tiny.session import normalise, plan, session_loss
from tiny.teacher import Teacher
from tiny.validation import validate
from tiny.warmup import warm_up
from worker.backbones.tiny import build_tiny, load_tiny, resize_tiny, save_tiny

GROWS = {"blocks", "attention", "attention16"}  # what a run may have more of than the one that it goes on from


class Run:
    """One training run in `folder`: its checkpoint, its log (log.jsonl) and the pool it reads.

    The schedule is a function of progress (0 to 1): steps taken of `steps`, or computing time of `minutes`. With
    `steps` a run that was killed and started again does exactly what it would have done; with `minutes` it ends on
    time, fully annealed, whatever else the machine was doing. Of several processes (tiny.parallel) each learns from
    `batch` images of its own; the first keeps the time, the log and the checkpoint.
    """

    def __init__(
        self,
        config: dict[str, Any],
        folder: Path,
        *,
        device: torch.device,
        steps: int | None,
        minutes: float | None,
        start: Path | None = None,
        clickers: Clickers | None = None,
    ) -> None:
        self.clickers = clickers or Clickers()
        self.config, self.folder, self.device = config, folder, device
        self.steps, self.minutes = steps, minutes
        self.pool = Pool(folder, decoded=device.type == "cuda")
        self.teacher = Teacher.read(folder, device) if (folder / "teacher.safetensors").exists() else None
        torch.manual_seed(config["seed"])
        first = config["stages"][0]["size"]
        self.sam: Sam = build_tiny(img_size=first, **config["model"]).to(device)
        self.average = copy.deepcopy(self.sam).requires_grad_(False)
        channels = self.teacher.channels if self.teacher else 1
        self.imitate = nn.Conv2d(config["model"]["dim"], channels, 1).to(device)
        settings = config["train"]
        encoder = [*self.sam.image_encoder.parameters(), *self.imitate.parameters()]
        decoder = [*self.sam.prompt_encoder.parameters(), *self.sam.mask_decoder.parameters()]
        groups = []
        for parameters, lr in ((encoder, settings["lr"]), (decoder, settings["decoder_lr"])):
            for decay, chosen in (
                (settings["weight_decay"], [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                groups.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": decay})
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=device.type == "cuda")
        self.step, self.elapsed = 0, 0.0
        found = bool(parallel.first_says(self.checkpoint.exists()))  # before the first process writes one
        if found:
            self._resume()
        else:
            if start is not None:
                self._start_from(start)
            else:
                warm_up(self.sam, **config["decoder_warmup"], seed=config["seed"])
            self.average.load_state_dict(self.sam.state_dict())
            self.save()

    @property
    def checkpoint(self) -> Path:
        """Where the state is kept."""
        return self.folder / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """0 at the start, 1 when done."""
        if self.steps is not None:
            return min(self.step / self.steps, 1.0)
        assert self.minutes is not None
        return min(self.elapsed / (60 * self.minutes), 1.0)

    def _start_from(self, path: Path) -> None:
        """Go on from the weights that an earlier run of this project exported.

        Its encoder may have had fewer blocks, at a stride or of attention: a new block starts as its shortcut, so that
        the larger model starts as the same function. Raises ValueError if the weights do not fit.
        """
        earlier, mine = load_tiny(path), self.sam.tiny_config
        old, new = ([*c["blocks"], c["attention"], c["attention16"]] for c in (earlier.tiny_config, mine))
        grown, free = all(a <= b for a, b in zip(old, new, strict=True)), dict.fromkeys(GROWS | {"img_size"})
        if not grown or earlier.tiny_config | free != mine | free:
            raise ValueError(f"{path} has other sizes than [model] of the configuration; start anew or change those.")
        self.sam.load_state_dict(self.sam.state_dict() | earlier.state_dict())

    def _stage(self) -> int:
        stages = self.config["stages"]
        return next((i for i, stage in enumerate(stages) if self.progress < stage["until"]), len(stages) - 1)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state["config"] != json.dumps(self.config):
            raise ValueError(
                f"The run in {self.folder} was started with another configuration. Go on with that one, "
                "or give another --folder to start anew."
            )
        self.sam.load_state_dict(state["sam"])
        self.average.load_state_dict(state["average"])
        self.imitate.load_state_dict(state["imitate"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed = state["step"], state["elapsed"]

    def save(self) -> None:
        """Write the checkpoint; a kill in the middle leaves the one before."""
        if parallel.rank():
            return
        state = {
            "sam": self.sam.state_dict(),
            "average": self.average.state_dict(),
            "imitate": self.imitate.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "config": json.dumps(self.config),
        }
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.rename(self.checkpoint)

    def export(self, path: Path) -> None:
        """Write the averaged weights as they ship, at the input size of the present stage."""
        resize_tiny(self.average, self.config["stages"][self._stage()]["size"])
        images = self.step * self.config["train"]["batch"] * parallel.world()
        save_tiny(
            self.average.eval(),
            path,
            {"training": f"{self.step} steps, {images} images, {self.progress:.0%} of the run"},
        )

    def _batches(self, samples: Samples, workers: int) -> Iterator[dict[str, Tensor]]:
        batch = self.config["train"]["batch"]
        loader = DataLoader(
            samples,
            batch_size=batch,
            sampler=range(self.step * batch * parallel.world() + parallel.rank(), len(samples), parallel.world()),
            num_workers=workers,
            prefetch_factor=max(2, 6 // workers) if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _samples(self, size: int) -> Samples:
        return Samples(self.pool, size, self.config["train"]["objects"], self.config["pool"], self.config["seed"])

    def _schedule(self) -> float:
        """Set the learning rates; returns their factor: linear warm-up, then half a cosine down to a hundredth."""
        warmup = self.config["train"]["warmup"]
        p = self.progress
        factor = (
            max(p / warmup, 0.01) if p < warmup else 0.505 + 0.495 * math.cos(math.pi * (p - warmup) / (1 - warmup))
        )
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        return factor

    def _learn(self, batch: dict[str, Tensor]) -> dict[str, float]:
        settings, seed = self.config["train"], self.config["seed"]
        steps = plan(np.random.default_rng((seed, 76, self.step)))  # the same in all processes: none waits for long
        rng = np.random.default_rng((seed, 77, self.step, parallel.rank()))
        known = batch["masks"].flatten(0, 1).numpy()
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        # The encoder is half the time in bf16; the decoder's small products gain nothing.
        pixels = normalise(self.sam, batch["image"], batch["valid"])
        with torch.autocast(self.device.type, torch.bfloat16):
            embeddings, p16 = self.sam.image_encoder.pyramid(pixels)
        embeddings = embeddings.float().repeat_interleave(settings["objects"], 0)
        masks, box_share = batch["masks"].flatten(0, 1), settings["box_share"]
        loss, log = session_loss(self.sam, embeddings, masks, known, rng, steps, self.clickers, box_share=box_share)
        if self.teacher is not None:
            features, known_there = self.teacher.features(batch["image"], batch["valid"])
            distance = F.smooth_l1_loss(self.imitate(p16.float()), features, reduction="none").mean(1)
            imitation = (distance * known_there).sum() / known_there.sum().clamp_min(1)
            weight = self.config["teacher"]["weight"] * (1 - 0.8 * self.progress)
            log["imitation"] = float(imitation.detach())
            loss = loss + 4 * weight * imitation
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        parallel.average(p.grad for p in parameters if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(parameters, settings["clip"])
        if torch.isfinite(norm):
            self.optimiser.step()
        self._average()
        return {"loss": float(loss.detach()), "norm": float(norm), **log}

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config["train"]["ema"], (1 + self.step) / (10 + self.step))
        mine, theirs = self.average.state_dict(), self.sam.state_dict()
        floats = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)

    def train(self, *, workers: int = 1, say: Any = print) -> None:
        """Train to the end of the schedule, saving and validating on the way."""
        settings = self.config["train"]
        clock = saved = validated = time.monotonic()
        stage, batches, recent = -1, iter(()), []
        with (self.folder / "log.jsonl").open("a") as log:
            while self.progress < 1:
                if self._stage() != stage:
                    stage = self._stage()
                    size = self.config["stages"][stage]["size"]
                    resize_tiny(self.sam, size)
                    resize_tiny(self.average, size)
                    samples = self._samples(size)
                    batches = self._batches(samples, workers)
                factor = self._schedule()
                self.sam.train()
                recent.append(self._learn(next(batches)))
                self.step += 1
                now = time.monotonic()
                due, took, clock = now - saved > 60 * settings["checkpoint_minutes"], now - clock, now
                self.elapsed = parallel.first_says(self.elapsed + took)
                if parallel.rank():
                    recent.clear()
                    continue
                if len(recent) == 20 or self.progress >= 1:
                    names = sorted({name for one in recent for name in one})
                    means = {k: round(float(np.mean([r[k] for r in recent if k in r])), 4) for k in names}
                    record = {
                        "step": self.step,
                        "minutes": round(self.elapsed / 60, 2),
                        "size": size,
                        "lr": factor,
                        **means,
                    }
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    left = (1 - self.progress) / max(self.progress, 1e-6) * self.elapsed / 60
                    say(f"step {self.step}  {self.progress:.1%}  {left:.0f} min left  {took:.2f} s/step  {means}")
                    recent = []
                if now - validated > 60 * settings["validate_minutes"] or self.progress >= 1:
                    measured = {"step": self.step, "minutes": round(self.elapsed / 60, 2)}
                    measured |= {"validation": validate(self.average.eval(), samples, self.clickers)}
                    log.write(json.dumps(measured) + "\n")
                    log.flush()
                    say(f"validation at step {self.step}: {measured['validation']}")
                    validated = time.monotonic()
                if due or self.progress >= 1:
                    self.save()
                    saved = time.monotonic()


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
