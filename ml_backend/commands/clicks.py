"""`bald-sam clicks`: export the click log, report on it, bring its database up to date."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ml_backend.cli import fail, load_settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from ml_backend.settings import Settings

FORMATS = ("parquet", "csv", "jsonl", "pointprompt")


class Day(click.ParamType[datetime]):
    """A day, or a moment in ISO form; UTC if it names no zone."""

    name = "day"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The moment. Fails as Click does."""
        from ml_backend.clicks.filter import parse_day

        try:
            return parse_day(value)
        except ValueError:
            self.fail(f"{value!r} is no day such as 2026-11-23.", param, ctx)


def _chosen(command: Any) -> Any:
    """Options that choose a part of the click log."""
    for option in (
        click.option("--with-users", is_flag=True, help="Users by name instead of pseudonym."),
        click.option("--until", type=Day(), help="Objects begun before this day, 2026-12-01."),
        click.option("--since", type=Day(), help="Objects begun on or after this day, 2026-11-01."),
        click.option("--project", "projects", type=int, multiple=True, help="Only this project; may be repeated."),
        click.option("--url", help="SQLAlchemy URL of the click log; without it BALD_SAM_CLICKS_URL or the default."),
    ):
        command = option(command)
    return command


@click.group()
def clicks() -> None:
    """Export the click log, or report on it."""


@clicks.command()
@click.option("--format", "format_", type=click.Choice(FORMATS), required=True, help="pointprompt makes a folder.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File or folder to write.")
@click.option("--json", "as_json", is_flag=True, help="Say what was written as JSON.")
@_chosen
def export(format_: str, out: Path, as_json: bool, with_users: bool, **options: Any) -> None:
    """Write every click with its proposal and outcome: docs/click-log.md explains the columns."""
    from sqlalchemy.exc import SQLAlchemyError

    from ml_backend.clicks.export import export as write
    from ml_backend.clicks.filter import Filter
    from ml_backend.clicks.people import read_key

    settings, engine = _open(options["url"])
    chosen = Filter(options["projects"], options["since"], options["until"])
    try:
        count = write(engine, format_, out, chosen=chosen, key=None if with_users else read_key(settings.data_dir))
    except ModuleNotFoundError as exc:
        fail(f"Parquet needs {exc.name}, which is not installed: pip install 'bald-sam[evaluate]', or use csv.")
    except SQLAlchemyError as exc:
        fail(f"The click log cannot be read: {exc}")
    except OSError as exc:
        fail(f"Cannot write {out}: {exc.strerror or exc}.")
    what = "images" if format_ == "pointprompt" else "clicks"
    click.echo(json.dumps({what: count, "out": str(out)}) if as_json else f"{count} {what} in {out}")


@clicks.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("clicks.html"), show_default=True)
@_chosen
def report(out: Path, with_users: bool, **options: Any) -> None:
    """Write one HTML page: are proposals followed, and do they pay?"""
    from sqlalchemy.exc import SQLAlchemyError

    from ml_backend.clicks.filter import Filter
    from ml_backend.clicks.people import read_key
    from ml_backend.clicks.report import render

    settings, engine = _open(options["url"])
    chosen = Filter(options["projects"], options["since"], options["until"])
    try:
        page = render(engine, chosen=chosen, key=None if with_users else read_key(settings.data_dir))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except SQLAlchemyError as exc:
        fail(f"The click log cannot be read: {exc}")
    except OSError as exc:
        fail(f"Cannot write {out}: {exc.strerror or exc}.")
    click.echo(f"Open {out} in a browser.")


@clicks.command()
@click.option("--url", help="SQLAlchemy URL of the click log; without it BALD_SAM_CLICKS_URL or the default.")
def migrate(url: str | None) -> None:
    """Bring the click log's database to this version; serve does it by itself."""
    _, engine = _open(url)
    click.echo(f"The click log in {engine.url.render_as_string(hide_password=True)} is up to date.")


def _open(url: str | None) -> tuple[Settings, Engine]:
    """Settings and the engine of an up-to-date click log; exit 2 where there is none."""
    from sqlalchemy.exc import SQLAlchemyError

    from ml_backend.clicks.schema import make_engine
    from ml_backend.clicks.schema import migrate as bring_up_to_date

    settings: Settings = load_settings(clicks_url=url)
    try:
        engine = make_engine(settings.clicks_database(), settings.data_dir)
        bring_up_to_date(engine)
    except SQLAlchemyError as exc:
        fail(f"The click log cannot be opened: {getattr(exc, 'orig', None) or exc}")
    except (ValueError, OSError) as exc:
        fail(str(exc))
    return settings, engine
