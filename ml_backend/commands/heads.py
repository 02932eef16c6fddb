"""`bald-sam heads`: which heads there are, and which of them projects use. Nothing here needs torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from ml_backend.cli import fail, load_settings

if TYPE_CHECKING:
    from worker.contract import HeadChoice
    from worker.head.registry import HeadRegistry

SHIPPED = "shipped"
PROJECT = click.option("--project", type=click.IntRange(1), help="Of this project alone, not of all.")
REDIS = click.option("--redis-url", help="Where the workers are; without it the heads of the data directory.")


def open_registry(redis_url: str | None) -> HeadRegistry:
    """The heads of the data directory, and of the Redis that the option or the settings name; exit 2 if it is away."""
    import redis

    from worker.head.registry import HeadRegistry

    settings = load_settings(redis_url=redis_url)
    client = None
    if settings.redis_url is not None:
        client = redis.Redis.from_url(settings.redis_url.get_secret_value(), socket_connect_timeout=3, socket_timeout=5)
        try:
            client.ping()
        except redis.RedisError as error:
            fail(f"Redis cannot be reached ({type(error).__name__}). Check --redis-url, or BALD_SAM_REDIS_URL.")
    return HeadRegistry(settings.data_dir, client)


@click.group()
def heads() -> None:
    """List the heads; choose, pin or roll back the one in use.

    Running servers and workers take a change up with the next click.
    """


@heads.command("list")
@PROJECT
@REDIS
@click.option("--json", "as_json", is_flag=True)
def heads_list(project: int | None, redis_url: str | None, as_json: bool) -> None:
    """Heads, oldest first, with what they reached on tasks held out; then which one each project uses."""
    registry = open_registry(redis_url)
    in_use = registry.in_use(fresh=True)
    rows = [_row(registry, name, in_use.choices) for name in registry.names()]
    if project is not None:
        rows = [row for row in rows if row["project"] == project or in_use.of(project).head == row["name"]]
    shipped = [scope for scope, choice in in_use.choices.items() if choice.head is None]
    if "default" not in in_use.choices:
        shipped.append("default")
    rows.append({"name": SHIPPED, "backbone": "", "project": None, "held_out": {}, "used_by": sorted(shipped)})
    if as_json:
        choices = {scope: choice.model_dump(mode="json") for scope, choice in in_use.choices.items()}
        click.echo(json.dumps({"heads": rows, "in_use": choices}, indent=1))
        return
    for row in rows:
        held = row["held_out"]
        figures = f"AUC {held['auc']:.4f}, before {held['auc_before']:.4f}" if "auc" in held else ""
        users = [_who(scope, in_use.choices.get(scope)) for scope in row["used_by"]]
        star = "*" if row["used_by"] else " "
        click.echo(f"{star} {row['name']:<20} {row['backbone']:<20} {figures:<28} {', '.join(users)}".rstrip())


@heads.command("use")
@click.argument("name")
@PROJECT
@REDIS
def heads_use(name: str, project: int | None, redis_url: str | None) -> None:
    """Let all projects (or one) use the head NAME from the next click on; `shipped` is the one that came along."""
    registry = open_registry(redis_url)
    _say(project, _done(lambda: registry.use(None if name == SHIPPED else name, project)))


@heads.command("pin")
@PROJECT
@REDIS
@click.option("--off", is_flag=True, help="Let learning change the head again.")
def heads_pin(project: int | None, redis_url: str | None, off: bool) -> None:
    """Keep the head in use, whatever is learnt."""
    registry = open_registry(redis_url)
    _say(project, _done(lambda: registry.pin(project, pinned=not off)))


@heads.command("rollback")
@PROJECT
@REDIS
def heads_rollback(project: int | None, redis_url: str | None) -> None:
    """Go back to the head in use before, and pin it (`heads pin --off` lets learning change it again)."""
    registry = open_registry(redis_url)
    _say(project, _done(lambda: registry.rollback(project)))


def _row(registry: HeadRegistry, name: str, choices: dict[str, HeadChoice]) -> dict[str, Any]:
    users = sorted(scope for scope, choice in choices.items() if choice.head == name)
    row: dict[str, Any] = {"name": name, "backbone": "", "project": None, "held_out": {}, "used_by": users}
    try:
        described = registry.describe(name)
    except ValueError as error:
        click.echo(str(error), err=True)
        return row
    notes = described["notes"]
    return row | {
        "backbone": described["backbone"],
        "project": notes.get("project"),
        "objects": notes.get("objects"),
        "held_out": notes.get("held_out", {}),
    }


def _who(scope: str, choice: HeadChoice | None) -> str:
    name = "all other projects" if scope == "default" else f"project {scope}"
    return f"{name} (pinned)" if choice is not None and choice.pinned else name


def _done(change: Any) -> HeadChoice:
    try:
        choice: HeadChoice = change()
    except (OSError, ValueError) as error:
        fail(str(error))
    return choice


def _say(project: int | None, choice: HeadChoice) -> None:
    who = "All projects without a head of their own use" if project is None else f"Project {project} uses"
    pinned = "; it is pinned" if choice.pinned else ""
    fitting = f", for {choice.backbone}" if choice.backbone else ""
    click.echo(f"{who} {choice.head or 'the shipped head'}{fitting} from the next click on{pinned}.")
