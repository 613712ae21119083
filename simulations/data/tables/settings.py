"""``[data]`` of a scenario: files or a function that a population is made from, and how."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from adapters.settings import Settings
from aggregation.errors import ConfigError

ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
COLUMNS = ("text", "label", "prompt", "client", "split", "time", "group", "language")


class DataSettings(Settings):
    """Texts of one's own. Without files and without a function, the population is the households of [population].

    Raises:
        pydantic.ValidationError: A key is unknown, out of range, or contradicts another.
    """

    files: tuple[str, ...] = Field(
        default=(),
        description="files (.csv, .tsv, .jsonl, .parquet) or folders (LABEL/*.txt, CLIENT/LABEL/*.txt, or one that "
        "datasets' save_to_disk wrote), relative to the scenario file",
    )
    function: str = Field(
        default="", description="MODULE:FUNCTION of Python that returns rows instead of files: objects with the columns"
    )
    public: tuple[str, ...] = Field(
        default=(), description="files of public texts, which the first adapter's head is made from; see public_texts"
    )
    text: str = Field(default="text", min_length=1, description="column of the text")
    label: str = Field(
        default="label", description="column of the label; empty: the texts are for a language model, and have none"
    )
    prompt: str = Field(
        default="",
        description="for a language model: column of what each text answers; without one, texts are continued",
    )
    client: str = Field(default="", description="column of the client; without one, partition makes the clients")
    split: str = Field(
        default="", description="column that says train, validation or test; without one, holdout splits"
    )
    time: str = Field(default="", description="column of a time, for holdout = time: numbers, or ISO 8601")
    group: str = Field(
        default="", description="column of texts that belong together, such as a thread: no group is split"
    )
    language: str = Field(default="", description="column of the language, for the tables")
    broken: Literal["refuse", "skip"] = Field(
        default="refuse", description="what a broken row does: refuse (the run ends) or skip (it is counted)"
    )
    sample: int = Field(
        default=0, ge=0, description="largest number of rows that are used, which the seed chooses; 0: all rows"
    )
    partition: Literal["iid", "dirichlet", "shard", "linear", "exponential"] = Field(
        default="dirichlet",
        description="how flwr-datasets deals texts out where there is no column of clients: iid, dirichlet (mix of "
        "labels), shard (few labels each), linear or exponential (sizes)",
    )
    clients: int = Field(default=20, ge=4, le=10_000, description="clients that partition makes")
    concentration: float = Field(
        default=0.5, gt=0, description="of partition = dirichlet: small is one-sided, large is even"
    )
    shards: int = Field(default=2, ge=1, le=1000, description="of partition = shard: shards of one label a client")
    unseen: float = Field(
        default=0.2, gt=0, lt=1, description="share of clients that take no part in training; rounded, at least one"
    )
    minimum_texts: int = Field(
        default=10, ge=3, description="clients with fewer texts are left out; the table says how many"
    )
    holdout: Literal["hash", "time"] = Field(
        default="hash",
        description="which texts are for tests: hash (of their group, the same on every machine) or time (the latest)",
    )
    holdout_fraction: float = Field(default=0.25, gt=0, le=0.5, description="share of a client's texts for tests")
    validation_fraction: float = Field(
        default=0.2, gt=0, le=0.5, description="share of a client's other texts kept for its own validation"
    )
    near_duplicates: float = Field(
        default=0.8,
        ge=0.3,
        le=1,
        description="texts whose sets of three-character pieces overlap by this share (Jaccard) are one group; 1: only "
        "equal ones",
    )
    public_texts: int = Field(
        default=6,
        ge=1,
        le=1000,
        description="without files of public texts: texts of each label that are taken from clients and made public",
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.files and self.function:
            raise ValueError("files and function are both given: name one of them")
        if self.function and not ENTRY_POINT.fullmatch(self.function):
            raise ValueError(f"function {self.function!r} is not MODULE:FUNCTION")
        if self.prompt and self.label:
            raise ValueError("a prompt is for a language model, whose texts have no label: set label to nothing")
        if self.holdout == "time" and not self.time:
            raise ValueError("holdout = time needs the column of the time: set data.time")
        named = [name for name in (getattr(self, column) for column in COLUMNS) if name]
        if repeated := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"the column {repeated[0]!r} is named twice")
        return self

    @property
    def for_language_model(self) -> bool:
        """Whether a language model learns to write the texts."""
        return self.given and not self.label

    @property
    def given(self) -> bool:
        """Whether there are texts of one's own."""
        return bool(self.files or self.function)

    def require_texts(self) -> None:
        """Return if there are texts of one's own, or no other key asks for some.

        Raises:
            ConfigError: A key is set, and there are neither files nor a function.
        """
        idle = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        if idle and not self.given:
            raise ConfigError(
                f"data.{idle[0]} is set, and there are no texts: name them with data.files", about="data.files"
            )

    def located(self, folder: Path) -> Self:
        """The settings with relative paths taken from ``folder``."""
        found = {
            key: tuple(str((folder / name).resolve()) for name in getattr(self, key)) for key in ("files", "public")
        }
        return self.model_copy(update=found)
