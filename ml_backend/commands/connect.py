"""`bald-sam connect`."""

from __future__ import annotations

import json
import sys

import click
import requests
from rich.console import Console

from ml_backend.cli import fail, load_settings
from ml_backend.connect import connect as steps
from ml_backend.errors import BackendError
from ml_backend.label_studio_api import LabelStudioError, api_from

MARKS = {"right": "[green]✓[/green]", "mended": "[yellow]✓[/yellow]", "wrong": "[red]✗[/red]"}


@click.command()
@click.option("--project", required=True, type=click.IntRange(1), help="Number of the project, as in its address.")
@click.option("--backend", default="http://127.0.0.1:9090", show_default=True, help="This backend, from Label Studio.")
@click.option("--labels", help="Comma-separated: replace a labelling config that cannot be used.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def connect(project: int, backend: str, labels: str | None, as_json: bool) -> None:
    """Connect a project of your Label Studio (LABEL_STUDIO_URL, LABEL_STUDIO_API_KEY) to a running backend."""
    settings = load_settings()
    console = Console(highlight=False)
    names = [name.strip() for name in labels.split(",") if name.strip()] if labels else None
    found = []
    try:
        for step in steps(api_from(settings), project, backend.rstrip("/"), settings, labels=names):
            found.append(step)
            if not as_json:
                console.print(MARKS[step.state], step.text)
    except (BackendError, LabelStudioError) as error:
        fail(str(error))
    except requests.RequestException as error:
        fail(f"Label Studio at {settings.label_studio_url} cannot be reached ({type(error).__name__}). Does it run?")
    if as_json:
        click.echo(json.dumps([{"state": step.state, "text": step.text} for step in found]))
    if any(step.state == "wrong" for step in found):
        sys.exit(1)
