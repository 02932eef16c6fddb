"""Every setting of bald-sam, from `BALD_SAM_*` variables or a `.env` file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ml_backend.arms import parse_modes
from ml_backend.prelabel.task_prompts import checked_source
from worker.contract import RuntimeOptions

Roots = Annotated[tuple[Path, ...], NoDecode]
Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """One object for the whole program. Each field is `BALD_SAM_<NAME>` in the environment unless it says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix="BALD_SAM_", env_file=".env", extra="ignore", frozen=True, populate_by_name=True
    )

    data_dir: Path = Field(Path("~/.local/share/bald-sam"), description="Checkpoints, heads, click log.")
    redis_url: SecretStr | None = Field(None, description="Empty: everything runs in one process.")
    backbone: str = Field("tiny", description="tiny, mobile_sam, vit_b, vit_l or vit_h.")
    checkpoint: Path | None = Field(None, description="Weights of the backbone; empty: the downloaded ones.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "float32"] = Field(
        "auto", description="Number type of image encoders: 16 bits where that is quicker and as good."
    )
    zoom: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether later clicks look at the object from near; auto: with tiny."
    )
    head: str = Field("default", description="Name or path of a head; `none` for SAM's own mask.")
    strategy: str = Field("default", description="How the next click is chosen.")
    log_format: Literal["text", "json"] = Field("text", description="One line an event, for people; or JSON.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is logged.")
    local_roots: Roots = Field((), description="Colon-separated folders from which image paths may be read.")
    allowed_hosts: Names = Field((), description="Comma-separated private hosts from which images may be fetched.")
    cache_mb: int = Field(512, ge=1, description="Memory for embeddings, logits and images in each worker, MB.")
    embeddings_dir: Path | None = Field(None, description="Folder that keeps embeddings; `bald-sam embed` fills it.")
    embeddings_gb: float = Field(20.0, gt=0, description="Size of that folder, GB; the least recently used go.")
    max_image_mb: int = Field(64, ge=1, description="Largest image file, MB.")
    max_image_megapixels: int = Field(100, ge=1, description="Largest image, millions of pixels.")
    max_request_mb: int = Field(256, ge=1, description="Largest request body, MB.")
    max_waiting: int = Field(64, ge=1, description="Clicks that may wait for a worker; more are told to come back.")
    max_prompts: int = Field(500, ge=1, description="Regions that the prompts of one object may consist of.")
    fetch_timeout_s: float = Field(20.0, gt=0, description="Time to fetch one image, seconds.")
    deadline_s: float = Field(90.0, gt=0, description="Time to answer one click; Label Studio gives up after 100 s.")
    prefetch: int = Field(3, ge=0, description="How many next tasks are encoded ahead.")
    retrieve: str = Field(
        "auto",
        description="Prompts of Retrieve Predictions: auto, regions, everything, field:NAME; off: none.",
    )
    retrieve_budget_s: float = Field(
        60.0, gt=0, le=95, description="Time for Retrieve Predictions, seconds; what does not fit is pushed later."
    )
    recover: bool = Field(True, description="Restore a mask that was pending when the annotation was submitted.")
    train_after: int = Field(
        0, ge=0, description="Train a project by itself after so many submitted annotations; 0: only when asked."
    )
    click_log: bool = Field(True, description="Log clicks, proposals and what became of them.")
    clicks_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL of the click log; empty: SQLite in data_dir."
    )
    arms: str = Field("show", description="Who sees proposals: show, hide or mixed; by project: `show,3=mixed,7=hide`.")
    arm_unit: Literal["object", "task", "annotator"] = Field(
        "object", description="What `mixed` projects randomise: object, task or annotator."
    )
    arm_seed: int = Field(0, description="Seed of the randomisation.")
    basic_auth_user: str | None = Field(None, description="User that Label Studio must give; with the password.")
    basic_auth_pass: SecretStr | None = Field(None, description="Password that Label Studio must give.")
    token: SecretStr | None = Field(None, description="Bearer token that scripts may give instead.")
    label_studio_url: str | None = Field(
        None,
        validation_alias=AliasChoices("LABEL_STUDIO_URL", "LABEL_STUDIO_HOST", "label_studio_url"),
        description="Where Label Studio is, for images that were uploaded to it.",
    )
    label_studio_api_key: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("LABEL_STUDIO_API_KEY", "label_studio_api_key"),
        description="Personal access token of a user who may see the images.",
    )

    @field_validator("arms")
    @classmethod
    def _arms_can_be_read(cls, value: str) -> str:
        parse_modes(value)
        return value

    @field_validator("retrieve")
    @classmethod
    def _retrieve_is_a_source(cls, value: str) -> str:
        return value if value == "off" else checked_source(value)

    @field_validator("local_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return tuple(part for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("redis_url", "checkpoint", "clicks_url", "embeddings_dir", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("data_dir", "checkpoint", "embeddings_dir")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        try:
            return value.expanduser() if value else None
        except RuntimeError as error:  # no user of that name, or no HOME
            raise ValueError(f"nobody's home directory is {str(value)!r}: write the path out in full") from error

    def clicks_database(self) -> str | None:
        """SQLAlchemy URL of the click log, which may hold a password; None: SQLite in `data_dir`."""
        return self.clicks_url.get_secret_value() if self.clicks_url is not None else None

    def runtime_options(self) -> RuntimeOptions:
        """The part of the settings that a worker process needs."""
        return RuntimeOptions.model_validate(self.model_dump())
