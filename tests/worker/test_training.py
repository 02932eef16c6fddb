from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evaluation.datasets import read_pairs
from ml_backend.commands.heads import heads
from ml_backend.commands.train import train
from worker import training
from worker.backbones import Backbone
from worker.contract import Click, Prompts
from worker.decode import decode
from worker.encode import encode
from worker.head.features import coarse, feature_names
from worker.head.fit import FitOptions
from worker.head.kernel import Reach
from worker.head.linear import sam_centred
from worker.head.registry import HeadRegistry
from worker.head.store import Head, find_head, load_head, save_head
from worker.proposer import Proposer
from worker.training import SessionOptions, best_reach, collect, lowres_truth, train_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    items = []
    for number in range(4):
        labels = np.zeros((60, 90), np.uint8)
        labels[5:30, 5 + number : 40] = 1
        labels[35:55, 50:80] = 2
        image = np.random.default_rng(number).integers(0, 60, (60, 90, 3), dtype=np.uint8) + 80 * labels[..., None]
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(labels).save(root / "labels" / f"{number}.png")
        items.append({"name": str(number)})
    (root / "metadata.json").write_text(json.dumps({"name": "labelled", "items": items}))
    return root


def test_sampled_pixels_stand_for_the_image(backbone: Backbone, folder: Path) -> None:
    pairs = read_pairs(folder)
    pixels = collect(backbone, pairs, SessionOptions(clicks=2, pixels=4000, seed=1))
    assert pixels.features.shape[:2] == pixels.labels.shape == pixels.weights.shape
    assert set(pixels.clicks.tolist()) == {1, 2}
    assert pixels.features.shape[2] == len(feature_names(16))
    # Doubtful and wrong pixels and the object are sampled more often; the weights undo that.
    for state, number in enumerate(pixels.objects.tolist()):
        share = pairs[number].read_mask().mean()
        labels = pixels.labels[state].float()
        weighted = float((labels * pixels.weights[state]).sum() / pixels.weights[state].sum())
        assert weighted == pytest.approx(share, abs=0.04)


def test_truth_on_the_grid(backbone: Backbone, folder: Path) -> None:
    pair = read_pairs(folder)[0]
    prompts = Prompts(clicks=(Click(x=20.5, y=15.5),))
    grid = coarse(decode(backbone, encode(backbone, pair.read_image()), prompts))
    truth = lowres_truth(pair.read_mask(), grid)
    rows, cols = grid.frame.valid
    assert truth.shape == grid.logits.shape
    assert float(truth.sum()) / (rows * cols) == pytest.approx(pair.read_mask().mean(), rel=0.1)
    col, row = grid.frame.to_lowres(20.5, 15.5)
    assert truth[int(row), int(col)]


def test_a_trained_head_is_reproducible_and_kept(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    options = SessionOptions(clicks=2, pixels=64)
    made = [train_head(backbone, read_pairs(folder), options, FitOptions(rounds=2)) for _ in range(2)]
    assert torch.equal(made[0].posterior.mean, made[1].posterior.mean)
    path = tmp_path / "heads" / "mine" / "head.safetensors"
    save_head(made[0], path)
    read = find_head("mine", backbone_id=backbone.id, channels=16, data_dir=tmp_path)
    assert torch.equal(read.posterior.mean, made[0].posterior.mean)
    assert torch.equal(read.posterior.factor, made[0].posterior.factor)
    assert read.notes["objects"] == len(read_pairs(folder))
    assert Proposer(backbone, head="mine", data_dir=tmp_path).model_version.split("/")[1].startswith("mine-")


@pytest.mark.parametrize("spread", [0.02, 0.6])
def test_the_reach_of_a_click_suits_the_images(
    backbone: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    """Objects of these images are of one colour, the rest of others: a click must not speak for other colours."""
    head = Head("head", sam_centred(feature_names(16)), backbone.id, shows="head", reach=Reach(colour=spread))
    narrow, wide = Reach(colour=0.1), Reach(colour=3.0)
    monkeypatch.setattr(training, "REACHES", (Reach(colour=spread), narrow, wide))
    options = SessionOptions(clicks=3, seed=1)
    assert best_reach(backbone, read_pairs(folder), options, head) != wide
    monkeypatch.setattr(training, "REACHES", (wide, narrow))
    assert best_reach(backbone, read_pairs(folder), options, replace(head, reach=wide)) == narrow
    # One example says nothing about the chance in it, none nothing at all.
    assert best_reach(backbone, read_pairs(folder)[:1], options, replace(head, reach=wide)) == wide
    assert best_reach(backbone, [], options, head) == head.reach


def test_the_reach_is_kept_with_the_head(backbone: Backbone, tmp_path: Path) -> None:
    head = Head("head", sam_centred(feature_names(16)), backbone.id, reach=Reach(length=0.6, colour=0.08))
    save_head(head, tmp_path / "one.safetensors")
    assert load_head(tmp_path / "one.safetensors").reach == head.reach
    described = json.loads((tmp_path / "one.json").read_text())
    del described["reach"]
    (tmp_path / "one.json").write_text(json.dumps(described))
    assert load_head(tmp_path / "one.safetensors").reach == Reach()
    described["reach"] = {"colour": 0}
    (tmp_path / "one.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="must be positive"):
        load_head(tmp_path / "one.safetensors")


def test_nothing_to_train_on_is_said(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        collect(backbone, [], SessionOptions())


def test_default_falls_back_to_the_prior(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    head = find_head("default", backbone_id="vit_b-000000000000", channels=32, data_dir=tmp_path)
    assert head.id == "prior" and head.shows == "sam"
    assert "prior centred on SAM" in caplog.text


def test_chosen_head_is_the_default(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    head = train_head(backbone, read_pairs(folder), SessionOptions(clicks=1, pixels=32), FitOptions(rounds=1))
    save_head(head, tmp_path / "heads" / "mine" / "head.safetensors")
    HeadRegistry(tmp_path).use("mine")
    assert find_head("default", backbone_id=backbone.id, channels=16, data_dir=tmp_path).id.startswith("mine-")


@pytest.mark.parametrize("damage", ["missing", "json", "safetensors", "format"])
def test_unreadable_heads_are_explained(backbone: Backbone, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "heads" / "bad" / "head.safetensors"
    if damage != "missing":
        prior = find_head("none", backbone_id=backbone.id, channels=16, data_dir=tmp_path)
        save_head(Head("bad", prior.posterior, backbone.id), path)
        if damage == "json":
            path.with_suffix(".json").write_text("{")
        elif damage == "safetensors":
            path.write_bytes(b"\x00" * 50)
        else:
            path.with_suffix(".json").write_text(path.with_suffix(".json").read_text().replace("linear head 1", "x"))
    with pytest.raises(ValueError, match=r"cannot be read.*bald-sam train"):
        load_head(path)


def test_a_head_of_another_width_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    wide = find_head("none", backbone_id="vit_b-0", channels=32, data_dir=tmp_path)
    save_head(Head("wide", wide.posterior, "vit_b-0"), tmp_path / "heads" / "wide" / "head.safetensors")
    with pytest.raises(ValueError, match="features"):
        find_head("wide", backbone_id=backbone.id, channels=16, data_dir=tmp_path)


def test_commands(folder: Path, data_dir: Path) -> None:
    runner = CliRunner()
    arguments = ["--data", str(folder), "--name", "mine", "--objects", "4", "--clicks", "1", "--device", "cpu"]
    result = runner.invoke(train, [*arguments, "--calibrate", "0"])
    assert result.exit_code == 0, result.output
    assert (data_dir / "heads" / "mine" / "head.safetensors").is_file()
    assert runner.invoke(heads, ["use", "mine"]).exit_code == 0
    listed = json.loads(runner.invoke(heads, ["list", "--json"]).output)["heads"]
    assert {row["name"]: row["used_by"] for row in listed} == {"mine": ["default"], "shipped": []}
    assert runner.invoke(heads, ["use", "gone"]).exit_code == 2
    assert runner.invoke(heads, ["use", "shipped"]).exit_code == 0
