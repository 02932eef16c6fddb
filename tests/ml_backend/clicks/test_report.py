"""The report: its numbers against slow ones, and how it looks in a browser."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from ml_backend.arms import HIDE, SHOW
from ml_backend.clicks import arrays, charts, report, summary
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.people import People
from tests.ml_backend.clicks.conftest import HIDDEN, SHOWN, answer, disc, region, webhook
from tests.ml_backend.clicks.test_store import write

ARTIFACTS = Path(__file__).parents[3] / "artifacts"


@pytest.fixture
def filled(engine):
    """40 objects, every second one with hidden proposals; every third proposal followed, some with the other sign."""
    rng = np.random.default_rng(0)
    for k in range(40):
        arm = HIDDEN if k % 2 else SHOWN
        prompts = [(f"p{k}", 60.0, 40.0)]
        ring = (30.0 + k, 20.0 + k / 2, bool(k % 4))
        write(engine, answer(prompts, disc(8), proposal=ring, arm=arm, task=k))
        for step in range(1, 3 + k % 3):
            place = (ring[0] + 1, ring[1]) if k % 3 == 0 else (float(rng.uniform(1, 119)), float(rng.uniform(1, 79)))
            prompts = [*prompts, (f"p{k}-{step}", *place, k % 5 > 0)]
            ring = (20.0 + 10 * step, 60.0, True)
            write(engine, answer(prompts, disc(8 + 4 * step), proposal=ring, arm=arm, task=k))
        write(
            engine,
            webhook([region(disc(20), f"mask-p{k}", "Cat" if k % 2 else "Dog")], task=k, annotation=k, user=k % 3),
        )
    return engine


def test_numbers_against_slow_ones(filled, table):
    with filled.connect() as connection:
        page = summary.summarise(arrays.read(connection, Filter(), People(connection, b"key")))
    clicks, objects = table("clicks"), {row["id"]: row for row in table("objects")}
    shown = [row for row in clicks if row["proposal_shown"]]
    assert page["following"]["shown"] == {
        "proposals": len(shown),
        "followed": sum(row["followed"] for row in shown),
        "matched": sum(row["followed"] and row["sign_matched"] for row in shown),
    }
    assert 0 < page["following"]["shown"]["matched"] < page["following"]["shown"]["followed"] < len(shown)
    for origin in ("human", "suggested"):
        slow = [row["delta_iou"] for row in shown if row["origin"] == origin]
        half = 1.959964 * statistics.stdev(slow) / len(slow) ** 0.5
        mean = page["gain"][origin]
        assert (mean.n, mean.mean, mean.high - mean.mean) == pytest.approx((len(slow), statistics.mean(slow), half))
    arms = {row["title"]: row for row in page["arms"]["rows"]}["Clicks per object"]
    by_arm = {arm: [row["clicks"] for row in objects.values() if row["arm"] == arm] for arm in (SHOW, HIDE)}
    assert arms["gap"] == pytest.approx(statistics.mean(by_arm[SHOW]) - statistics.mean(by_arm[HIDE]))
    error = sum(statistics.variance(counts) / len(counts) for counts in by_arm.values()) ** 0.5
    assert arms["high"] - arms["gap"] == pytest.approx(1.959964 * error)
    labels = {row["name"]: row for row in dict(page["tables"])["Label"]}
    dogs = [row for row in shown if objects[row["object"]]["label"] == "Dog"]
    assert (labels["Dog"]["objects"], labels["Dog"]["shown"]) == (20, len(dogs))
    human = [row["delta_iou"] for row in dogs if row["origin"] == "human"]
    assert labels["Dog"]["human"] == pytest.approx(statistics.mean(human))
    assert sum(row["objects"] for row in dict(page["tables"])["Annotator"]) == 40
    assert page["latency"][0][1]["p50"] == pytest.approx(250)


def test_what_was_randomised_is_what_is_compared():
    names = {"arm_unit": (np.array([0, 0, 0, 1, 1]), ["task", "object"]), "user": (np.zeros(5, int), ["x"])}
    o = {"id": np.arange(5.0), "project": np.ones(5), "task": np.array([1.0, 1, 2, 2, 2])}
    log = arrays.Log(o=o, c={}, flag={}, number=np.zeros(0), at=np.zeros(0), names=names, ignored={})
    units = summary._units(log)
    assert [units[0] == units[1], len(set(units.tolist()))] == [True, 4]
    values = np.array([1.0, 3.0, 5.0, np.nan, 7.0])
    assert sorted(summary._unit_means(values, units, np.ones(5, bool))) == [2.0, 5.0, 7.0]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-20.0, -4.0, ("good", "Clicks: 12\u202f% fewer with proposals (4 to 20\u202f%).")),
        (4.0, 20.0, ("bad", "Clicks: 12\u202f% more with proposals (4 to 20\u202f%).")),
        (-4.0, 28.0, ("unsure", "Clicks: no clear difference (−4 to +28\u202f%).")),
    ],
)
def test_the_verdict_names_what_the_interval_allows(low, high, said):
    assert summary._verdict("Clicks", (low + high) / 2, low, high) == said


def test_weeks_begin_on_monday(engine):
    write(
        engine, answer([("a", 1.0, 1.0)], received=1_795_391_999.0), answer([("b", 1.0, 1.0)], received=1_795_392_000.0)
    )
    with engine.connect() as connection:
        log = arrays.read(connection, Filter(), People(connection, None))
    assert log.names["week"][1] == ["2026-11-16", "2026-11-23"]


def test_an_empty_log_has_a_page(engine):
    page = report.render(engine, chosen=Filter(projects=(5,)), key=b"key")
    assert "Nothing here yet" in page
    assert "only project 5" in page


def test_ticks_are_round():
    assert charts.nice_ticks(0, 0.93) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.nice_ticks(-7, 12) == [-10, -5, 0, 5, 10, 15]
    assert charts.nice_ticks(0, 0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_page_in_a_browser(filled, tmp_path, browser):
    page = report.render(filled, chosen=Filter(), key=b"key")
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page), "nothing is loaded from anywhere"
    assert "<script" not in page
    assert "example.com" not in page
    path = tmp_path / "report.html"
    path.write_text(page)
    tab = browser.new_page(viewport={"width": 1240, "height": 900})
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on(
        "request",
        lambda request: (
            complaints.append(request.url)
            if "report.html" not in request.url and not request.url.startswith("data:")
            else None
        ),
    )
    tab.goto(path.as_uri())
    assert complaints == []
    assert tab.locator("svg.chart").count() == 3
    assert tab.locator(".case").count() >= 2
    for wide in (1240, 420):
        tab.set_viewport_size({"width": wide, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= wide, "nothing sticks out"
        for image in tab.locator("img").all():
            assert image.evaluate("image => image.naturalWidth") > 0
        ARTIFACTS.mkdir(exist_ok=True)
        tab.screenshot(path=ARTIFACTS / f"click-report-{wide}.png", full_page=True)
    tab.close()
