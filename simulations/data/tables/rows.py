"""Rows of labelled texts, read from files, folders or a function. A broken row is named by its file and line.

Formats: ``.csv`` and ``.tsv`` with a header (RFC 4180), ``.jsonl`` with an object a line, ``.parquet``; folders of
``LABEL/*.txt`` or ``CLIENT/LABEL/*.txt``, and folders that ``save_to_disk`` of Hugging Face's datasets wrote. No pickle
is read, and nothing is downloaded.
"""

import csv
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from adapters.settings import Settings
from aggregation.errors import ConfigError, DataError
from client.training.examples import MAX_TEXT

ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
COLUMNS = ("text", "label", "prompt", "client", "split", "time", "group", "language")
MAX_ROWS = 5_000_000
MAX_FIELD = 2**20  # characters of a field of a CSV file; a text above MAX_TEXT is a broken row, not a broken file
MAX_NAME = 256  # characters of a label, a client or a group
SPLITS = ("train", "validation", "test")
Fields = Mapping[str, Any]
Placed = tuple[str, Fields | str]  # where it stands, and the fields of a row or what is wrong with it


class DataSettings(Settings):
    """Texts of one's own. Without files and without a function, the population is the households of [population]."""

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
        """Check that there are texts of one's own, or no other key asks for some. Raises ConfigError."""
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


@dataclass(frozen=True, slots=True)
class Row:
    """One text with what its columns say. Columns that the settings do not name are empty."""

    where: str  # file and line
    text: str
    label: str
    client: str
    split: str  # "", or one of SPLITS
    time: float
    group: str
    language: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Rows:
    """What was read. ``broken`` has a line for each broken row: where it stands, and what is wrong."""

    good: tuple[Row, ...]
    broken: tuple[str, ...]


def read_rows(settings: DataSettings) -> Rows:
    """Read all rows that ``settings`` name.

    Raises:
        ConfigError: A file or function does not exist or is of another form, or a column is missing from a file.
        DataError: A file is damaged, or there are too many rows.
    """
    if settings.function:
        return _rows(_called(settings.function), settings)
    return _rows(_chained(settings.files), settings)


def read_public(settings: DataSettings) -> Rows:
    """The rows of the files of public texts; their clients and splits do not matter. Raises as ``read_rows``."""
    only = settings.model_copy(update={"client": "", "split": "", "time": "", "group": ""})
    return _rows(_chained(settings.public), only)


def _rows(found: Iterable[Placed], settings: DataSettings) -> Rows:
    good: list[Row] = []
    broken: list[str] = []
    for count, (where, fields) in enumerate(found):
        if count >= MAX_ROWS:
            raise DataError(f"{where}: there are more than {MAX_ROWS} rows", about="data.files", value=where)
        row = fields if isinstance(fields, str) else _row(where, fields, settings)
        if isinstance(row, str):
            broken.append(f"{where}: {row}")
        else:
            good.append(row)
    return Rows(tuple(good), tuple(broken))


def _row(where: str, fields: Fields, settings: DataSettings) -> Row | str:
    """The row, or what is wrong with it."""
    for key in ("text", "label", "prompt", "client", "split", "time", "group"):
        name = getattr(settings, key)
        if name and name not in fields:
            there = ", ".join(map(str, fields))[:MAX_NAME]
            return f"there is no column {name}, only {there}; name it with data.{key}"
        if name and fields[name] is None:
            return f"{name} is missing"
    for column in filter(None, (settings.text, settings.prompt)):
        text = fields[column]
        if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
            return f"{column} is not a text of Unicode"
        if not text.strip() or len(text) > MAX_TEXT:
            return f"{column} is empty or longer than {MAX_TEXT} characters"
    names = {}
    for key in ("label", "client", "split", "group", "language"):
        column = getattr(settings, key)
        value = fields.get(column) if column else ""
        names[key] = "" if value is None else str(value).strip()
        if len(names[key]) > MAX_NAME or not names[key].isprintable():
            return f"{column} is longer than {MAX_NAME} characters, or not printable"
        if column and key in ("label", "client") and not names[key]:
            return f"{column} is empty"
    if names["split"] not in ("", *SPLITS):
        return f"{settings.split} is {names['split'][:40]!r}, not {', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
    time = _time(fields[settings.time]) if settings.time else 0.0
    if not math.isfinite(time):
        return f"{settings.time} is neither a number nor a time in ISO 8601"
    prompt = fields[settings.prompt] if settings.prompt else ""
    return Row(where, fields[settings.text], time=time, prompt=prompt, **names)


def _time(value: object) -> float:
    """Seconds; NaN if it cannot be read."""
    if isinstance(value, datetime):
        return value.timestamp()
    try:
        return float(str(value))
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def _chained(names: Iterable[str]) -> Iterator[Placed]:
    for name in names:
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"there is no file or folder {path}", about="data.files", value=name)
        yield from _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Placed]]:
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
        return _saved_to_disk if saved else _folder
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ConfigError(
            f"{path} is of no known kind; use {', '.join(readers)}, or a folder", about="data.files", value=str(path)
        )
    return readers[path.suffix.lower()]


def _csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(lines, [])
            if not header or len(set(header)) != len(header):
                raise DataError(f"{path} has no header, or one that names a column twice", about=path.name)
            start = lines.line_num + 1
            for cells in lines:
                where, start = f"{path}:{start}", lines.line_num + 1
                if not cells:
                    continue  # an empty line
                if len(cells) != len(header):
                    yield where, f"{len(cells)} fields, and the header has {len(header)}"
                else:
                    yield where, dict(zip(header, cells, strict=True))
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; convert it", about=path.name) from None
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: not CSV: {error}", about=path.name) from error


def _jsonl(path: Path) -> Iterator[Placed]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; convert it", about=path.name) from None


def _object(line: str) -> Fields | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    return value if isinstance(value, dict) else "not an object"


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(4096):
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", fields
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not Parquet, or damaged: {_first_line(error)}", about=path.name) from error


def _folder(folder: Path) -> Iterator[Placed]:
    """``LABEL/*.txt`` or ``CLIENT/LABEL/*.txt``: one text a file, under the usual names of the columns."""
    found = False
    for path in sorted(folder.rglob("*.txt")):
        parts = path.relative_to(folder).parts[:-1]
        if not path.is_file() or len(parts) not in (1, 2):
            continue
        found = True
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            yield str(path), "not UTF-8"
            continue
        yield str(path), {"text": text, "label": parts[-1], "client": parts[0] if len(parts) == 2 else None}
    if not found:
        raise ConfigError(f"{folder} has neither LABEL/*.txt nor CLIENT/LABEL/*.txt", about="data.files")


def _saved_to_disk(folder: Path) -> Iterator[Placed]:
    """A ``Dataset``, or a ``DatasetDict`` whose keys become the column ``split``. Class labels become their names."""
    from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # of several libraries
        raise DataError(f"{folder} cannot be read by datasets: {_first_line(error)}", about=folder.name) from error
    parts: dict[str, Dataset] = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    for split, dataset in parts.items():
        names = {key: feature.names for key, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
        for number, fields in enumerate(dataset, 1):
            named = {key: names[key][value] for key, value in fields.items() if key in names and value is not None}
            whole = f", {split}" if split else ""
            yield f"{folder}{whole}, row {number}", {"split": split or None, **fields, **named}


def _called(name: str) -> Iterator[Placed]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"there is no function {name}: {_first_line(error)}", about="data.function") from error
    try:
        for number, fields in enumerate(function(), 1):
            yield f"{name}, row {number}", fields if isinstance(fields, Mapping) else "not an object"
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        reason = f"{name} failed: {type(error).__name__}: {_first_line(error)}"
        raise DataError(reason, about="data.function", value=name) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
