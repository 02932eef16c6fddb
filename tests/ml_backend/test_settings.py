from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import AliasChoices, SecretStr, ValidationError

from ml_backend.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


#: What an environment variable can hold: no NUL, no half characters.
VALUES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
NUMBERS = st.integers() | st.floats() | st.sampled_from(["1e400", "0x10", "1_0", "nan", " 5 ", "5,0"])
WORDS = st.sampled_from(["on", "off", "", "none", "~", "/", ":", "show,3=mixed", "3=hide", "field:a", "redis://", ","])
SECRETS = ["BALD_SAM_REDIS_URL", "BALD_SAM_CLICKS_URL", "BALD_SAM_BASIC_AUTH_PASS", "BALD_SAM_TOKEN"]
SECRETS += ["LABEL_STUDIO_API_KEY"]


def variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"BALD_SAM_{name.upper()}"


def rows() -> list[str]:
    """The table of the page: one row a field, as the class has it."""
    found = []
    for name, field in Settings.model_fields.items():
        named = {None: "", (): "", True: "on", False: "off"}
        is_number = type(field.default) is int  # 0 == False
        default = str(field.default) if is_number else named.get(field.default, str(field.default))
        found.append(f"| `{variable(name)}` | {f'`{default}`' if default else ''} | {field.description} |")
    return found


def test_the_page_lists_every_setting_as_it_is() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert table == rows()


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize("name", ["data_dir", "checkpoint", "embeddings_dir"])
def test_the_home_of_nobody_is_told(name: str) -> None:
    told = pytest.raises(ValidationError, match="write the path out in full")
    with mock.patch.dict(os.environ, {variable(name): "~nobody-of-that-name/data"}), told:
        Settings(_env_file=None)


@hypothesis_settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(list(Settings.model_fields)), VALUES | NUMBERS.map(str) | WORDS, max_size=5))
def test_whatever_the_environment_holds_is_taken_or_told(given: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, {variable(name): value for name, value in given.items()}):
        try:
            settings = Settings(_env_file=None)
        except ValidationError as error:
            assert {str(one["loc"][0]).removeprefix("BALD_SAM_") for one in error.errors()}
            return
    again = Settings(_env_file=None, **settings.model_dump())
    assert again == settings, "what was read can be given"
    assert settings.max_waiting >= 1
    assert settings.deadline_s > 0
    assert settings.runtime_options().max_image_mb == settings.max_image_mb


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.sampled_from(SECRETS), st.text("abcdefXYZ0123456789", min_size=12, max_size=20), WORDS)
def test_secrets_are_in_no_repr_and_no_error(name: str, secret: str, other: str) -> None:
    value = f"postgresql://u:{secret}@h/n" if name.endswith("_URL") else secret
    with mock.patch.dict(os.environ, {name: value, "BALD_SAM_ARMS": other}):
        try:
            settings = Settings(_env_file=None)
        except ValidationError as error:
            said = str(error.errors(include_url=False, include_input=False))
        else:
            said = repr(settings) + str(settings) + settings.model_dump_json() + repr(settings.runtime_options())
            held = [one for one in settings.model_dump().values() if isinstance(one, SecretStr)]
            assert any(secret in one.get_secret_value() for one in held)
    assert secret not in said
