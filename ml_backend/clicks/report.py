"""The report: whether proposals are followed and whether they pay, as one HTML page that needs nothing else."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from jinja2 import Environment, PackageLoader
from sqlalchemy import Engine

from ml_backend.clicks.arrays import read
from ml_backend.clicks.cases import find_cases
from ml_backend.clicks.filter import Filter
from ml_backend.clicks.people import People
from ml_backend.clicks.rows import many_rows
from ml_backend.clicks.summary import Mean, summarise


def render(engine: Engine, *, chosen: Filter, key: bytes | None) -> str:
    """The page. `key` None shows users by name, otherwise by pseudonym."""
    with many_rows(), engine.connect() as connection:
        people = People(connection, key)
        log = read(connection, chosen, people)
        page = summarise(log)
        page["cases"] = find_cases(connection, chosen)
    page["chosen"] = chosen
    page["made"] = datetime.now(UTC)
    environment = Environment(loader=PackageLoader("ml_backend"), autoescape=True)
    environment.filters.update(number=_number, percent=_percent, interval=_interval)
    return environment.get_template("click_report.html").render(page)


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:,.{digits}f}".replace(",", "\u202f")


def _percent(part: float, whole: float, digits: int = 0) -> str:
    return f"{100 * part / whole:.{digits}f}\u202f%" if whole else "–"


def _interval(mean: Mean, digits: int = 2) -> str:
    if not mean.n:
        return "–"
    middle = f"{mean.mean:.{digits}f}"
    return middle if np.isnan(mean.low) else f"{middle} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"
