from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices

from ml_backend.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def rows() -> list[str]:
    """The table of the page: one row a field, as the class has it."""
    found = []
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        variable = str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"BALD_SAM_{name.upper()}"
        named = {None: "", (): "", True: "on", False: "off"}
        is_number = type(field.default) is int  # 0 == False
        default = str(field.default) if is_number else named.get(field.default, str(field.default))
        found.append(f"| `{variable}` | {f'`{default}`' if default else ''} | {field.description} |")
    return found


def test_the_page_lists_every_setting_as_it_is() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert table == rows()


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
