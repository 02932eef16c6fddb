from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evaluation import ablation, ablation_report
from evaluation.laplace_settings import AXES, BASE, SETTINGS, Setting, chosen
from evaluation.scenes import draw
from ml_backend.commands.ablate import ablate
from worker import acquisition
from worker.acquisition.registry import REGISTRY
from worker.head.fit import Pixels
from worker.head.network import Kind
from worker.head.posterior import Flavour, Prior, Structure, Subset

D = 3


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    """Windows of 3 features around pixels of 12 objects, two states each; the first feature decides."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 60, 9 * D, generator=generator)
    labels = features[..., 4 * D] + 0.5 * torch.randn(24, 60, generator=generator) > 0
    objects = torch.arange(12).repeat_interleave(2)
    return Pixels(features, labels, torch.ones(24, 60), objects, torch.ones(24, dtype=torch.int64))


def test_there_are_35_settings_on_five_axes() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS) == 35
    assert {setting.axis for setting in SETTINGS} == set(AXES)
    # What is computed differs, too, not only the names.
    assert len({(s.kind, s.flavour, s.prior_precision, s.effective, s.samples, s.linearised) for s in SETTINGS}) == 35
    base = next(setting for setting in SETTINGS if setting.name == BASE)
    assert base == Setting(BASE, "curvature")


def test_settings_are_chosen_by_name_and_axis() -> None:
    assert chosen(None) == SETTINGS
    assert [s.name for s in chosen("linear-full, tempering")] == [
        *("linear-full", "effective-40", "effective-4000", "all-pixels")
    ]
    with pytest.raises(ValueError, match="no setting called lowrank"):
        chosen("lowrank")


def test_no_object_is_in_two_splits(pixels: Pixels) -> None:
    marked = Pixels(
        pixels.objects[:, None, None].expand(24, 60, 9 * D).float() + 1,
        pixels.labels, pixels.weights, pixels.objects, pixels.clicks,
    )  # fmt: skip
    rows = ablation.split(marked)
    groups = [set((part[0][:, 0] * rows.scale[0]).round().tolist()) for part in (rows.fitted, rows.tuned, rows.judged)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 12
    few = Pixels(pixels.features[:8], pixels.labels[:8], pixels.weights[:8], pixels.objects[:8], pixels.clicks[:8])
    with pytest.raises(ValueError, match="at least ten"):
        ablation.split(few)


def test_pixels_are_drawn_by_their_weights(pixels: Pixels) -> None:
    weights = torch.zeros(24, 60)
    weights[:, 7] = 1.0
    rows = ablation.split(Pixels(pixels.features, pixels.labels, weights, pixels.objects, pixels.clicks))
    found = {tuple(row.tolist()) for row in rows.judged[0].round(decimals=4)}
    assert found <= {tuple(row.tolist()) for row in (pixels.features[:, 7] / rows.scale).round(decimals=4)}


def test_every_kind_of_setting_is_fitted_and_close_to_the_reference(pixels: Pixels) -> None:
    fitter = ablation.Fitter(ablation.split(pixels))
    for setting in chosen(f"{BASE},linear-full,conv-last_layer-full,prior-held_out,samples-10"):
        fitted = fitter.fit(setting)
        assert fitted.posterior is not None and fitted.refused == ""
        assert fitted.measures["covariance_error"] < 1e-3
        assert fitted.measures["nll"] < 0.55  # ln 2 = 0.69 for one that knows nothing
        assert 0 < fitted.measures["bald"] < np.log(2)
    # Kronecker factors only approximate; the figure says so.
    assert fitter.fit(chosen("linear-kron")[0]).measures["covariance_error"] > 1e-3


def test_what_cannot_be_fitted_says_why(pixels: Pixels) -> None:
    one_class = Pixels(
        pixels.features, torch.ones(24, 60, dtype=torch.bool), pixels.weights, pixels.objects, pixels.clicks
    )
    fitted = ablation.Fitter(ablation.split(one_class)).fit(chosen(BASE)[0])
    assert fitted.posterior is None and "inside and from outside" in fitted.refused
    with pytest.raises(ValueError, match="has no posterior"):
        ablation.register(fitted, torch.ones(D))


def test_measures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = torch.tensor([0.9, 0.8, 0.2, 0.4])
    monkeypatch.setattr(ablation, "outlook", lambda *_: (inside, torch.tensor([0.1, 0.3, 0.05, 0.2])))
    labels = torch.tensor([True, False, False, True])
    found = ablation.pixel_measures(chosen(BASE)[0], None, torch.zeros(4, 1), labels)  # type: ignore[arg-type]
    assert found["nll"] == pytest.approx(-np.log([0.9, 0.2, 0.8, 0.4]).mean(), abs=1e-6)
    # Each is alone in its bin: the gaps are 0.1, 0.8, 0.2, 0.6.
    assert found["calibration"] == pytest.approx((0.1 + 0.8 + 0.2 + 0.6) / 4, abs=1e-6)
    # Wrong are the second and the last; both have more BALD than both of the others.
    assert found["auroc"] == 1.0
    assert found["bald"] == pytest.approx(0.1625)


def test_sampling_converges_to_the_closed_form(pixels: Pixels) -> None:
    fitter = ablation.Fitter(ablation.split(pixels))
    base = chosen(BASE)[0]
    posterior = fitter.fit(base).posterior
    assert posterior is not None
    rows = fitter.rows(Kind.MLP).judged[0][:50]
    exact = ablation.outlook(base, posterior, rows)
    many = Setting("many", "predictive", samples=500)
    drawn = ablation.outlook(many, posterior, rows, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn[0], exact[0], atol=0.08) and torch.allclose(drawn[1], exact[1], atol=0.08)


def test_the_table_has_paired_differences() -> None:
    names = [ablation.PREFIX + BASE, ablation.PREFIX + "linear-full", "entropy"]
    clicks = pd.DataFrame(
        [
            {"dataset": "d", "pair": pair, "strategy": name, "seed": 0, "click": click, "iou": iou}
            for pair in ("a", "b")
            for name, last in zip(names, (0.5, 0.7, 0.3), strict=True)
            for click, iou in ((1, 0.1), (2, last))
        ]
    )
    fits = [ablation.Fitted(s, None, {"nll": 0.2}).described() for s in chosen(f"{BASE},linear-full,linear-diag")]
    frame = ablation_report.table(clicks, fits, {}, "tiny").set_index("setting")
    assert frame.loc["linear-full", "auc"] == pytest.approx(0.4)
    assert frame.loc["linear-full", ["difference", "low", "high"]].tolist() == pytest.approx([0.1] * 3)
    assert frame.loc["entropy", "axis"] == "reference" and np.isnan(frame.loc["entropy", "nll"])
    assert np.isnan(frame.loc["linear-diag", "auc"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten drawn scenes with an object each."""
    root = tmp_path / "scenes"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for number in range(10):
        scene = draw(number, (96, 128))
        Image.fromarray(scene.image).save(root / "images" / f"{number}.png")
        Image.fromarray(scene.labels.astype(np.uint8)).save(root / "labels" / f"{number}.png")
    items = [{"name": str(number)} for number in range(10)]
    (root / "metadata.json").write_text(json.dumps({"name": "scenes", "items": items}))
    return root


def test_the_command_makes_tables_and_figures_and_goes_on(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    out = tmp_path / "out"
    names = f"{BASE},linear-full,samples-10"
    arguments = [
        *("--train", str(folder), "--data", str(folder), "--backbones", "tiny@96,tiny@128", "--settings", names),
        *("--objects", "10", "--limit", "1", "--clicks", "2", "--out", str(out)),
    ]
    first = CliRunner().invoke(ablate, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    frame = pd.read_csv(out / "ablation.csv")
    assert set(frame["backbone"]) == {"tiny@96", "tiny@128"}
    assert set(frame[frame["axis"] != "reference"]["setting"]) == set(names.split(","))
    assert frame["auc"].between(0, 1).all()
    for axis in ("curvature", "network", "predictive", "reference"):
        with Image.open(out / f"ablation_{axis}.png") as figure:
            assert figure.size[0] > 500
    assert "| linear-full |" in (out / "ablation.md").read_text()
    before = (out / "tiny@96" / "clicks.csv").read_text()
    again = CliRunner().invoke(ablate, arguments, catch_exceptions=False)
    assert again.exit_code == 0 and (out / "tiny@96" / "clicks.csv").read_text() == before
    seeded = CliRunner().invoke(ablate, [*arguments, "--seed", "1"])
    assert seeded.exit_code == 2 and "other weights or training objects" in seeded.output
    other = CliRunner().invoke(ablate, [*arguments, "--backbones", "vit_b"])
    assert other.exit_code == 2 and "bald-sam models download vit_b" in other.output


def test_flavours_of_the_settings_are_all_allowed() -> None:
    assert Flavour(Subset.SUBNETWORK, Structure.FULL) in {setting.flavour for setting in SETTINGS}
    assert {setting.flavour.prior for setting in SETTINGS} == set(Prior)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rows, and strategies that a test registers are gone after it."""
    for name, rows in (("FITTED", 2000), ("TUNED", 500), ("JUDGED", 2000)):
        monkeypatch.setattr(ablation, name, rows)
    acquisition.names()  # the strategies register themselves once, on import
    kept = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(kept)
