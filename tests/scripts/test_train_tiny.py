"""Training runs of tiny: what they learn from, and that a killed one goes on as if it had not been."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.backbones.tiny import build_tiny, load_tiny, save_tiny

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFIG = """
seed = 1
[pool]
leave_out = []
webp_quality = 0
scenes = 14
scene_side = 96
held_out = 0.25
scene_share = 1.0
favour = {}
[model]
widths = [8, 8, 16, 16]
blocks = [1, 1, 1, 1]
dim = 32
heads = 4
mlp_dim = 32
[teacher]
channels = 8
weight = 1.0
[decoder_warmup]
steps = 2
side = 64
count = 2
lr = 1e-3
[train]
batch = 2
objects = 2
lr = 1e-3
decoder_lr = 1e-3
weight_decay = 0.01
warmup = 0.1
ema = 0.9
clip = 1.0
box_share = 0.2
checkpoint_minutes = 0.0
validate_minutes = 60.0
[[stages]]
size = 64
until = 0.5
[[stages]]
size = 96
until = 1.0
"""


def _photographs(folder: Path, sets: dict[str, int]) -> Path:
    """A folder of so many images and labels by set, as `--data` takes it."""
    source, rng = folder / "source", np.random.default_rng(0)
    for name, count in sets.items():
        for kind in ("images", "labels"):
            (source / name / kind).mkdir(parents=True)
        (source / name / "metadata.json").write_text("{}")
        for number in range(count):
            image = cv2.GaussianBlur(rng.integers(0, 255, (60, 80, 3), np.uint8), (0, 0), 3)
            cv2.imwrite(str(source / name / "images" / f"{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 98])
            cv2.imwrite(str(source / name / "labels" / f"{number}.png"), (image[..., 0] > 127).astype(np.uint8))
    return source


TEACHER = """
import torch
from safetensors.torch import load_file

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 1024, 16, 16)

    def forward(self, x):
        return None, None, self.conv(x)

def load(path):
    network = Network()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)
"""


@pytest.mark.usefixtures("scripts_on_path")
def test_a_teacher_is_imitated_where_the_image_is(tmp_path: Path) -> None:
    pool, teacher = importlib.import_module("tiny.pool"), importlib.import_module("tiny.teacher")
    source = _photographs(tmp_path, {"birds": 8})
    (tmp_path / "net.py").write_text(TEACHER)
    torch.manual_seed(1)
    convolution = torch.nn.Conv2d(3, 1024, 16, 16)
    weights = {f"conv.{name}": value.detach() for name, value in convolution.named_parameters()}
    save_file(weights, tmp_path / "net.safetensors")
    said = _start(tmp_path, "--steps", "3", "--data", str(source), "--teacher", str(tmp_path / "net.safetensors"))
    out = said.communicate(timeout=300)[0]
    assert said.returncode == 0, out
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["imitation"] > 0

    packed, read = pool.Pool(tmp_path), teacher.Teacher.read(tmp_path, torch.device("cpu"))
    image = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    image[:, :, :48] = torch.from_numpy(packed.read(0)[0][:48, :64]).permute(2, 0, 1)
    features, inside = read.features(image, torch.tensor([[48, 64], [40, 20]]))
    assert features.shape == (2, 8, 4, 4)
    assert inside.sum((1, 2)).tolist() == [12, 2]
    with torch.no_grad():
        mean, std = (torch.tensor(of).view(3, 1, 1) for of in (teacher.MEAN, teacher.STD))
        cells = convolution.double()((image[:1].double() / 255 - mean) / std)[0].permute(1, 2, 0)
    expected = (cells - read.mean.double()) @ read.project.double()
    torch.testing.assert_close(features[0].permute(1, 2, 0).double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("scripts_on_path")
def test_a_pool_packed_for_another_machine_is_smaller_and_packed_again_there(tmp_path: Path) -> None:
    pool = importlib.import_module("tiny.pool")
    config = tomllib.loads(CONFIG)["pool"] | {"scenes": 0}
    source = _photographs(tmp_path, {"birds": 5, "left": 1})
    plain, carried, there = (tmp_path / name for name in ("plain", "carried", "there"))
    pool.pack(source, plain, config)
    pool.pack(source, carried, config | {"webp_quality": 50})
    assert (carried / "pool.bin").stat().st_size < 0.7 * (plain / "pool.bin").stat().st_size
    pool.pack(carried, there, config | {"scenes": 3, "leave_out": ["left"]}, 2)
    packed, before = pool.Pool(there), pool.Pool(plain)
    kept = [item for item in packed.items if item.set == "birds"]
    assert [(i.name, i.size, i.held_out) for i in kept] == [
        (i.name, i.size, i.held_out) for i in before.items if i.set == "birds"
    ]
    assert [item.set for item in packed.items[5:]] == ["scenes"] * 3
    assert any(item.held_out for item in kept)
    image, labels = packed.read(0)
    theirs, same = before.read(0)
    assert np.array_equal(labels, same)
    assert np.abs(image.astype(float) - theirs).mean() < 6


def _start(folder: Path, *more: str, processes: int = 1) -> subprocess.Popen[str]:
    (folder / "config.toml").write_text(CONFIG)
    several = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--") if processes > 1 else ()
    command = [
        *(
            sys.executable,
            *several,
            str(SCRIPTS / "train_tiny.py"),
            "--config",
            str(folder / "config.toml"),
            "--folder",
            str(folder),
        ),
        *("--out", str(folder / "out.safetensors"), "--device", "cpu", "--threads", "1", "--workers", "0", *more),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    undisturbed = _start(whole, "--steps", "12")
    said = undisturbed.communicate(timeout=300)[0]
    assert undisturbed.returncode == 0, said
    first = _start(killed, "--steps", "12")
    for _ in range(3000):
        checkpoint = killed / "checkpoint.pt"  # the first is written before any step
        if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= 1:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL
    step = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
    assert 1 <= step < 12
    second = _start(killed, "--steps", "12")
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 0, said
    ours, theirs = load_file(killed / "out.safetensors"), load_file(whole / "out.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    assert load_tiny(killed / "out.safetensors").image_encoder.img_size == 96


@pytest.mark.usefixtures("scripts_on_path")
def test_layered_sections_come_more_often_and_half_of_them_in_two_tones(tmp_path: Path) -> None:
    pool, samples = importlib.import_module("tiny.pool"), importlib.import_module("tiny.samples")
    pool.pack(None, tmp_path, {**tomllib.loads(CONFIG)["pool"], "scenes": 28})
    made = samples.Samples(pool.Pool(tmp_path), 96, 1, tomllib.loads(CONFIG)["pool"], 1)
    kinds = [samples._kind(made.pool.items[members[0]]) for members in made.sets]
    shares = dict(zip(kinds, made.weights, strict=True))
    assert shares.pop("scenes bands") == pytest.approx(3 / 9)
    assert list(shares.values()) == pytest.approx([1 / 9] * 6)
    layered = next(index for index, item in enumerate(made.pool.items) if item.name.startswith("bands"))
    tones = []
    for number in range(60):
        sample = made.make(layered, np.random.default_rng(number), augment=True)
        if sample is not None:
            height, width = sample["valid"]
            values = sample["image"][:, :height, :width]
            tones.append(float(((values < 60) | (values > 195)).float().mean()))  # noise comes after
    assert 0.3 < np.mean(np.array(tones) > 0.9) < 0.7


@pytest.mark.usefixtures("scripts_on_path")
def test_a_larger_encoder_starts_as_the_same_function(tmp_path: Path) -> None:
    training = importlib.import_module("tiny.training")
    pool = importlib.import_module("tiny.pool")
    config = tomllib.loads(CONFIG)
    pool.pack(None, tmp_path, config["pool"])
    torch.manual_seed(3)
    small = build_tiny(64, **config["model"])
    for module in small.modules():  # so that its blocks are more than their shortcuts
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    save_tiny(small, tmp_path / "small.safetensors")

    def started(blocks: list[int], attention: int, attention16: int) -> Any:
        more = {"blocks": blocks, "attention": attention, "attention16": attention16}
        larger = {**config, "model": {**config["model"], **more}}
        (tmp_path / "checkpoint.pt").unlink(missing_ok=True)
        start = tmp_path / "small.safetensors"
        return training.Run(larger, tmp_path, device=torch.device("cpu"), steps=1, minutes=None, start=start)

    large = started([1, 2, 3, 1], 2, 1).sam.eval()
    assert large.tiny_config["blocks"] == [1, 2, 3, 1]
    assert (large.tiny_config["attention"], large.tiny_config["attention16"]) == (2, 1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            large.image_encoder(image), load_tiny(tmp_path / "small.safetensors").image_encoder(image)
        )
    with pytest.raises(ValueError, match="other sizes"):
        started([0, 1, 1, 1], 0, 0)


def _average_in(rank: int, meeting: str, into: str) -> None:
    sys.path.insert(0, str(SCRIPTS))
    parallel = importlib.import_module("tiny.parallel")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank, 4.0])]
    parallel.average(tensors)
    torch.save([*tensors, torch.tensor(parallel.first_says(7.0 + rank))], f"{into}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_take_the_mean_of_what_they_found_and_the_first_ones_word(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_average_in, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        matrix, vector, said = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(matrix, torch.full((2, 3), 0.5))
        torch.testing.assert_close(vector, torch.tensor([5.0, 4.0]))
        assert said == 7.0


def test_two_processes_train_as_one_run(tmp_path: Path) -> None:
    exported = []
    for name in ("once", "again"):
        folder = tmp_path / name
        folder.mkdir()
        run = _start(folder, "--steps", "3", processes=2)
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0, said
        assert said.count("wrote ") == 1
        assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [3, 3]
        exported.append(load_file(folder / "out.safetensors"))
    for key, value in exported[0].items():
        torch.testing.assert_close(exported[1][key], value, rtol=0, atol=0)
    alone = tmp_path / "alone"
    alone.mkdir()
    run = _start(alone, "--steps", "3")
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    different = load_file(alone / "out.safetensors")
    assert any(not torch.equal(different[key], value) for key, value in exported[0].items())


def test_going_on_with_another_configuration_is_refused(tmp_path: Path) -> None:
    first = _start(tmp_path, "--steps", "2")
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 0, said
    changed = tmp_path / "other.toml"
    changed.write_text(CONFIG.replace("seed = 1", "seed = 2"))
    second = _start(tmp_path, "--steps", "4", "--config", str(changed))
    said = second.communicate(timeout=300)[0]
    assert second.returncode == 2
    assert "another configuration" in said
    assert "Traceback" not in said


def test_a_configuration_says_only_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    train_tiny = importlib.import_module("train_tiny")
    whole, further = (train_tiny.read_config(SCRIPTS / "tiny" / name) for name in ("config.toml", "continue.toml"))
    assert further["pool"] == whole["pool"] and further["model"] == whole["model"]
    assert (further["train"]["objects"], further["train"]["clip"]) == (1, whole["train"]["clip"])
    assert further["stages"][-1] == {"size": 384, "until": 1.0}
