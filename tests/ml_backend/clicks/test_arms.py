from __future__ import annotations

import pytest

from ml_backend.arms import HIDE, REMEMBERED, SHOW, Arms, parse_modes


def test_modes_by_project() -> None:
    assert parse_modes("show") == {None: "show"}
    assert parse_modes(" mixed, 7=hide,3 = show ") == {None: "mixed", 7: "hide", 3: "show"}
    assert parse_modes("") == {None: "show"}


@pytest.mark.parametrize("text", ["maybe", "x=show", "3=", "3=maybe", "=show,"])
def test_modes_that_cannot_be_read_say_so(text: str) -> None:
    with pytest.raises(ValueError, match="Arms are like 'mixed'"):
        parse_modes(text)


def test_a_project_that_is_not_mixed_has_one_arm() -> None:
    arms = Arms(parse_modes("show,7=hide"))
    assert {arms.arm(1, 1, f"s{i}").name for i in range(50)} == {SHOW}
    assert {arms.arm(7, 1, f"s{i}").name for i in range(50)} == {HIDE}
    assert arms.arm(7, 1, "s").unit == "project"


def test_mixed_is_balanced_reproducible_and_depends_on_the_seed() -> None:
    first, again, other = (Arms({None: "mixed"}, seed=seed) for seed in (1, 1, 2))
    sessions = [f"{i}" for i in range(4000)]
    drawn = [first.arm(1, 1, s).name for s in sessions]
    assert drawn == [again.arm(1, 1, s).name for s in reversed(sessions)][::-1]
    # 4000 fair coins: five standard deviations are 158.
    assert abs(drawn.count(SHOW) - 2000) < 160
    different = sum(a != other.arm(1, 1, s).name for a, s in zip(drawn, sessions, strict=True))
    assert 1800 < different < 2200


def test_units_share_an_arm() -> None:
    by_task = Arms({None: "mixed"}, unit="task")
    for task in range(30):
        assert len({by_task.arm(1, task, f"{task}-{i}").name for i in range(5)}) == 1
    assert len({by_task.arm(1, task, f"{task}-0").name for task in range(30)}) == 2
    by_person = Arms({None: "mixed"}, unit="annotator")
    for person in range(30):
        assert len({by_person.arm(1, i, f"{person}-{i}", f"u{person}").name for i in range(5)}) == 1


def test_an_object_keeps_its_arm_when_its_user_becomes_known() -> None:
    arms = Arms({None: "mixed"}, unit="annotator")
    for i in range(40):
        before = arms.arm(1, i, f"s{i}", None)
        assert before.unit == "task", "nobody is known at the first click"
        assert arms.arm(1, i, f"s{i}", f"u{i}") is before
    assert arms.arm(1, 1, "another", "u1").unit == "annotator"


def test_memory_is_bounded() -> None:
    arms = Arms({None: "mixed"})
    for i in range(REMEMBERED + 10):
        arms.arm(1, 1, str(i))
    assert len(arms._given) == REMEMBERED


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="one of object, task, annotator"):
        Arms({}, unit="day")
