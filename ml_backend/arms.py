"""Experiment arms: who sees proposals. Assignment is a seeded hash, so any process gives the same answer."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

SHOW, HIDE, MIXED = "show", "hide", "mixed"
MODES = (SHOW, HIDE, MIXED)
UNITS = ("object", "task", "annotator")

#: Sessions whose arm is remembered, so that an object never changes arms half-way.
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Arm:
    """Whether proposals are shown for one object, and how that was decided: logged with the object.

    `unit`: what was randomised (`object`, `task`, `annotator`), or `project` where the project is not mixed.
    """

    name: str
    mode: str
    unit: str
    seed: int

    @property
    def shows(self) -> bool:
        """True if the annotator may see the proposal. A hidden one is computed and logged all the same."""
        return self.name == SHOW


def parse_modes(text: str) -> dict[int | None, str]:
    """`"mixed"` or `"show,3=mixed,7=hide"`: mode by project id; the key None is every other project (default show).

    Raises ValueError that says what is wrong.
    """
    modes: dict[int | None, str] = {None: SHOW}
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        project, equals, mode = (piece.strip() for piece in part.rpartition("="))
        if mode not in MODES or (equals and not project.isdigit()):
            raise ValueError(f"Arms are like 'mixed' or 'show,3=mixed,7=hide' ({', '.join(MODES)}), not {part!r}.")
        modes[int(project) if equals else None] = mode
    return modes


class Arms:
    """Assigns each object to an arm; `mixed` projects get half of their units in each.

    Label Studio does not say who clicks before the first draft is saved: with the unit `annotator` such an object is
    randomised by task, and logged so.
    """

    def __init__(self, modes: Mapping[int | None, str], *, unit: str = "object", seed: int = 0) -> None:
        if unit not in UNITS:
            raise ValueError(f"The unit of randomisation is one of {', '.join(UNITS)}, not {unit!r}.")
        self._modes, self._unit, self._seed = modes, unit, seed
        self._given: OrderedDict[str, Arm] = OrderedDict()
        self._lock = Lock()

    def arm(self, project: int, task: int, session: str, user: str | None = None) -> Arm:
        """The arm of one object. The same arguments and seed always give the same arm."""
        mode = self._modes.get(project, self._modes[None])
        if mode != MIXED:
            return Arm(mode, mode, "project", self._seed)
        with self._lock:
            arm = self._given.get(session) or self._assign(project, task, session, user)
            self._given[session] = arm
            self._given.move_to_end(session)
            if len(self._given) > REMEMBERED:
                self._given.popitem(last=False)
        return arm

    def _assign(self, project: int, task: int, session: str, user: str | None) -> Arm:
        unit = "task" if self._unit == "annotator" and user is None else self._unit
        key = {"object": session, "task": str(task), "annotator": user}[unit]
        digest = hashlib.sha256(f"{self._seed}\n{project}\n{unit}\n{key}".encode()).digest()
        return Arm(SHOW if digest[0] < 128 else HIDE, MIXED, unit, self._seed)
