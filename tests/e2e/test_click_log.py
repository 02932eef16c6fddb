"""A scripted session of two people in a real browser, and what the click log says of it: exactly what they did."""

from __future__ import annotations

import csv
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner
from playwright.sync_api import Browser

from ml_backend.commands.clicks import clicks
from ml_backend.demo_pictures import sample_pictures
from ml_backend.labeling_config import recommended_config
from tests.e2e.conftest import ARTIFACTS, EMAIL, PASSWORD, Annotator, Backend, Recorder, Studio

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

OBJECTS = 20
SECOND = "second@example.com"
#: What the page calls for a smart click.
INTERACTIVE = "interactive-annotating"

#: kind, number of the prompt, positive, origin, (x, y) in percent
Step = tuple[str, int, bool, str, tuple[float, float]]


@dataclass
class Done:
    """One object as the script made it."""

    task: int
    person: str
    shown: bool
    steps: list[Step] = field(default_factory=list)


class Person(Annotator):
    """An annotator who is signed in by name; the prompt tool stays in hand from task to task."""

    def sign_in(self, email: str) -> None:
        self.email = email
        self.page.goto(f"{self.studio.url}/user/login")
        self.page.fill("input[name=email]", email)
        self.page.fill("input[name=password]", PASSWORD)
        self.page.click("button[type=submit]")
        self.page.wait_for_url(lambda url: "/user/login" not in url)

    def begin(self, project: int, task: int, *, first: bool) -> None:
        """Open a task; Auto-Annotation is switched on once a browser."""
        self.open(project, task)
        if first:
            self.take_the_prompt_tool()
        else:
            self.page.get_by_text("View region details").click()
            self.page.keyboard.press("m")
            self.page.wait_for_timeout(300)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag a prompt, percent of the image. The page may or may not ask for a new mask."""
        box = self.page.locator("img[src^='blob:']").bounding_box()
        assert box is not None
        (x0, y0), (x1, y1) = (
            (box["x"] + box["width"] * x / 100, box["y"] + box["height"] * y / 100) for x, y in (start, end)
        )
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2, steps=4)
        self.page.mouse.move(x1, y1, steps=4)
        asked, answered = [], []
        self.page.on("request", lambda request: asked.append(request) if INTERACTIVE in request.url else None)
        self.page.on(
            "requestfinished", lambda request: answered.append(request) if INTERACTIVE in request.url else None
        )
        self.page.mouse.up()
        self.page.wait_for_timeout(1500)
        # An answer that comes later would be taken for that of the next click.
        self._wait_for(lambda: len(answered) == len(asked), "the answer to a drag does not come")
        self.page.wait_for_timeout(700)

    def submit_and_wait(self) -> None:
        before = len(self.recorder.webhooks("ANNOTATION_CREATED"))
        self.page.locator("button[name=submit]").click()
        self._wait_for(lambda: len(self.recorder.webhooks("ANNOTATION_CREATED")) > before, "no webhook after Submit")


def make_object(person: Person, project: int, task: int, number: int, *, pending: bool) -> Done:
    """Four clicks: a first one, the ring where one is shown (every second object), a negative one, a last one."""
    answer = person.click(40, 38)
    ring = answer.region("keypointlabels")
    done = Done(task, person.email, ring is not None, [("placed", 1, True, "human", (40, 38))])
    if ring is not None and number % 2 == 0:
        second = (ring["value"]["x"], ring["value"]["y"])
        positive = "inside" in ring["value"]["keypointlabels"][0]
        origin = "suggested"
    else:
        second, positive, origin = away((60, 50), ring), True, "human"
    ring = person.click(*second, negative=not positive).region("keypointlabels")
    done.steps.append(("placed", 2, positive, origin, second))
    third = away((25, 75), ring)
    ring = person.click(*third, negative=True).region("keypointlabels")
    done.steps.append(("placed", 3, False, "human", third))
    if number % 4 == 1:
        person.page.keyboard.press("Control+z")
        person.page.wait_for_timeout(1000)
        done.steps.append(("deleted", 3, False, "human", third))
    elif number % 4 == 3:
        moved = away((second[0] + 5, second[1] + 5), ring)
        person.drag(second, moved)
        done.steps.append(("moved", 2, positive, "human", moved))
        ring = person.recorder.clicks[-1].region("keypointlabels")
    fourth = away((47, 45), ring)
    person.click(*fourth)
    done.steps.append(("placed", 4, True, "human", fourth))
    if not pending:
        person.accept()
    person.submit_and_wait()
    return done


def away(place: tuple[float, float], ring: dict[str, Any] | None) -> tuple[float, float]:
    """`place`, or one beside it if the ring is there."""
    if ring is not None and abs(ring["value"]["x"] - place[0]) < 3 and abs(ring["value"]["y"] - place[1]) < 3:
        return place[0] + 6, place[1] + 6
    return place


def sign_up(studio: Studio, email: str) -> None:
    """A second member of the organisation."""
    session = requests.Session()
    session.trust_env = False
    session.get(f"{studio.url}/user/signup", timeout=30).raise_for_status()
    form = {"email": email, "password": PASSWORD, "csrfmiddlewaretoken": session.cookies["csrftoken"]}
    answer = session.post(f"{studio.url}/user/signup", data=form, headers={"Referer": studio.url}, timeout=30)
    answer.raise_for_status()
    assert "/user/signup" not in answer.url, "Label Studio did not take the second user"


@pytest.fixture
def backend(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """One process that shows proposals for half of the objects; the cheapest strategy, for only the log is judged."""
    started = Backend(tmp_path_factory.mktemp("clicks"), studio, None)
    started.environment |= {"BALD_SAM_ARMS": "mixed", "BALD_SAM_ARM_SEED": "1", "BALD_SAM_STRATEGY": "entropy"}
    try:
        started.start()
        yield started
    finally:
        started.stop()
        print(started.log())


def test_every_click_and_its_origin(
    studio: Studio, backend: Backend, recorder: Recorder, browser: Browser, tmp_path: Path
) -> None:
    sign_up(studio, SECOND)
    config = {"title": "Click log", "label_config": recommended_config(["Cat"], boxes=False)}
    project = studio.api.call("POST", "/api/projects", json=config)["id"]
    picture = next(iter(sample_pictures(tmp_path / "pictures")))
    for number in range(OBJECTS):
        with picture.open("rb") as content:
            file = (f"{number:02d}-{picture.name}", content)
            studio.api.call("POST", f"/api/projects/{project}/import", files={"file": file})
    connection = {"url": recorder.url, "title": "bald-sam", "is_interactive": True, "project": project}
    assert studio.api.call("POST", "/api/ml", json=connection)["state"] == "CO"
    tasks = [task["id"] for task in studio.api.tasks(project)]

    made: list[Done] = []
    for person_number, email in enumerate((EMAIL, SECOND)):
        context = browser.new_context(viewport={"width": 1400, "height": 860})
        person = Person(context.new_page(), studio, recorder, ARTIFACTS / "click-log")
        person.sign_in(email)
        for index in range(OBJECTS // 2):
            number = person_number * OBJECTS // 2 + index
            person.begin(project, tasks[number], first=index == 0)
            made.append(make_object(person, project, tasks[number], number, pending=number == OBJECTS - 1))
        context.close()

    rows, objects = logged(backend, len(made))
    assert {row["arm"] for row in objects.values()} == {"show", "hide"}
    assert len({row["user_id"] for row in objects.values()}) == 2
    for done in made:
        thing = objects[done.task]
        of_object = [row for row in rows if row["object"] == thing["id"]]
        found = [(row["kind"], row["click"], bool(row["positive"]), row["origin"]) for row in of_object]
        assert found == [step[:4] for step in done.steps], done
        for row, step in zip(of_object, done.steps, strict=True):
            place = 100 * row["x"] / thing["width"], 100 * row["y"] / thing["height"]
            assert place == pytest.approx(step[4], abs=0.3), (done, row)
        assert (thing["arm"] == "show") == done.shown
        assert any(row["proposal_x"] is not None for row in of_object), "hidden proposals are computed and logged"
        assert thing["outcome"] == "submitted"
        assert thing["last_iou"] == 1.0, "nothing was edited: the last mask is the submitted one"
    first, last = (
        {objects[done.task]["user_id"] for done in made if done.person == email} for email in (EMAIL, SECOND)
    )
    assert len(first) == len(last) == 1
    assert first != last
    assert sum(row["kind"] == "placed" for row in rows) == 4 * OBJECTS
    assert {row["kind"] for row in rows} == {"placed", "moved", "deleted"}
    assert {row["origin"] for row in rows} == {"human", "suggested"}

    (annotation,) = studio.api.call("GET", f"/api/tasks/{made[-1].task}/annotations/")
    assert [region["type"] for region in annotation["result"]] == ["brushlabels"], (
        "the lost mask is back, the prompts are gone"
    )
    assert annotation["result"][0]["id"] == objects[made[-1].task]["mask_id"]

    page = requests.get(f"{backend.url}/report", timeout=60)
    assert page.status_code == 200
    assert "Human and suggested clicks" in page.text
    (ARTIFACTS / "click-log").mkdir(parents=True, exist_ok=True)
    (ARTIFACTS / "click-log" / "report.html").write_text(page.text)
    database = f"sqlite:///{backend.folder / 'data' / 'clicks.sqlite'}"
    out = tmp_path / "clicks.csv"
    exported = CliRunner().invoke(clicks, ["export", "--format", "csv", "--out", str(out), "--url", database, "--json"])
    assert json.loads(exported.output)["clicks"] == len(rows)
    with out.open(newline="") as file:
        assert [row["origin"] for row in csv.DictReader(file)] == [row["origin"] for row in rows]


def logged(backend: Backend, count: int) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Clicks in order, and objects by task, when the last mask has been put back and measured."""
    for _ in range(600):
        with sqlite3.connect(backend.folder / "data" / "clicks.sqlite") as connection:
            connection.row_factory = sqlite3.Row
            objects = [dict(row) for row in connection.execute("SELECT * FROM objects ORDER BY id")]
            rows = [dict(row) for row in connection.execute("SELECT * FROM clicks ORDER BY object, seq")]
        settled = len(objects) == count and all(row["outcome"] == "submitted" and not row["stale"] for row in objects)
        if settled:
            break
        time.sleep(0.2)
    return rows, {row["task"]: row for row in objects}
