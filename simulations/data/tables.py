"""A population from texts of one's own (``[data]`` of a scenario): rows, clients, splits and public texts.

Formats: ``.csv`` and ``.tsv`` with a header (RFC 4180), ``.jsonl`` with an object a line, ``.parquet``; folders of
``LABEL/*.txt`` or ``CLIENT/LABEL/*.txt``, and folders that ``save_to_disk`` of Hugging Face's datasets wrote. In place
of texts there may be pictures, as files of a folder, or in a column ``image``. No pickle is read, and nothing is
downloaded. A broken row is named by its file and line. No group of near-duplicates is on both
sides of a split: a group is for tests or not, for all clients. Only a column ``split`` of the data is kept as it is.
"""

import csv
import hashlib
import heapq
import importlib
import json
import math
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from datasketch import MinHash, MinHashLSH
from pydantic import AfterValidator, Field, model_validator
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from aggregation.errors import ConfigError, DataError
from aggregation.pki.certificates import is_device_id
from client.training.examples import MAX_TEXT, NO_LABEL, longest
from edgeadapt.bases.markedwords import labelled, unmarked
from edgeadapt.bases.media import MAX_SOURCE, is_medium
from edgeadapt.bases.readers import COLUMNS as FILES
from edgeadapt.bases.readers import SUFFIXES
from edgeadapt.bases.tasks import CLASSES, CLASSIFICATION, TASKS, WORDS, OwnTask, Target, find_task, label_text
from edgeadapt.formats.settings import Settings
from edgeadapt.formats.storage import read
from simulations.data.population import Client, LabelledText, Population

ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
COLUMNS = ("text", "label", "prompt", "client", "split", "time", "group", "language")
MAX_ROWS = 5_000_000
MAX_FIELD = 2**20  # characters of a field of a CSV file; a text above MAX_TEXT is a broken row, not a broken file
MAX_NAME = 256  # characters of a label, a client or a group
SPLITS = TRAIN, VALIDATION, TEST = ("train", "validation", "test")
Fields = Mapping[str, Any]
Placed = tuple[str, Fields | str]  # where it stands, and the fields of a row or what is wrong with it
PUBLIC_SHARE = 0.2  # of a label's texts that are taken from clients
SHINGLE = 3  # characters
TEXT = "text"
PERMUTATIONS = 64
_NUMBERS, _SPACES = re.compile(r"\d+"), re.compile(r"\s+")
WRITTEN = frozenset("#%&*@/\\")  # punctuation by its category, part of a name by its use: C#
LISTED = re.compile(r"""\[(['"].*['"]|-?\d[\d., -]*|)\]|\{(['"].*|)\}""")
NOTHING_SAID = frozenset({"na", "n/a", "nan", "null", "none", "-", "?"})  # labels that programs write for a missing one
FEWEST_TRAINED = 3  # clients that take part: what a secure sum needs


class DataSettings(Settings):
    """Texts of one's own. Without files and without a function, the population is the households of [population]."""

    files: tuple[str, ...] = ()
    """files (.csv, .tsv, .jsonl, .parquet) or folders (LABEL/*.txt, CLIENT/LABEL/*.txt, pictures or sounds in their
    place, or one that datasets' save_to_disk wrote), relative to the scenario file"""
    function: str = ""
    """MODULE:FUNCTION of Python that returns rows instead of files: objects with the columns"""
    public: tuple[str, ...] = ()
    """files of public texts, which the first adapter's head is made from; see public_texts"""
    text: str = Field(default="text", min_length=1)
    """column of the text; rows without one may have a column image: a path from the file, or its content"""
    label: str = "label"
    """column of the label; empty: the texts are for a language model, and have none"""
    task: Annotated[str, AfterValidator(TASKS.require)] = CLASSIFICATION
    """what is learned: classification of the label, multilabel (a list of labels, or a+b), words (labels of words in
    the text, as in `wake me at [nine](hour)`), or a task that an installed package adds (docs/how-to/extend.md)"""
    prompt: str = ""
    """for a language model: column of what each text answers; without one, texts are continued"""
    client: str = ""
    """column of the client; without one, partition makes the clients"""
    split: str = ""
    """column that says train, validation or test; without one, holdout splits"""
    time: str = ""
    """column of a time, for holdout = time: numbers, or ISO 8601"""
    group: str = ""
    """column of texts that belong together, such as a thread: no group is split"""
    language: str = ""
    """column of the language, for the tables"""
    broken: Literal["refuse", "skip"] = "refuse"
    """what a broken row does: refuse (the run ends) or skip (it is counted)"""
    long: Literal["broken", "cut"] = "broken"
    """what a text above 2000 characters is: broken, or cut there (and counted)"""
    sample: int = Field(default=0, ge=0)
    """largest number of rows that are used, which the seed chooses: whole clients where there is a column of clients,
    else rows; 0: all rows"""
    partition: Literal["iid", "dirichlet", "shard", "linear", "exponential"] = "dirichlet"
    """how flwr-datasets deals texts out where there is no column of clients: iid, dirichlet (mix of labels), shard (few
    labels each), linear or exponential (sizes)"""
    clients: int = Field(default=20, ge=4, le=10_000)
    """clients that partition makes"""
    concentration: float = Field(default=0.5, gt=0)
    """of partition = dirichlet: small is one-sided, large is even"""
    shards: int = Field(default=2, ge=1, le=1000)
    """of partition = shard: shards of one label a client"""
    unseen: float = Field(default=0.2, gt=0, lt=1)
    """share of clients that take no part in training; rounded, at least one"""
    minimum_texts: int = Field(default=10, ge=3)
    """clients with fewer texts are left out; the table says how many"""
    holdout: Literal["hash", "time"] = "hash"
    """which texts are for tests: hash (of their group, the same on every machine) or time (the latest)"""
    holdout_fraction: float = Field(default=0.25, gt=0, le=0.5)
    """share of a client's texts for tests"""
    validation_fraction: float = Field(default=0.2, gt=0, le=0.5)
    """share of a client's other texts kept for its own validation"""
    near_duplicates: float = Field(default=0.8, ge=0.3, le=1)
    """texts whose sets of three-character pieces overlap by this share (Jaccard) are one group; 1: only equal ones"""
    public_texts: int = Field(default=6, ge=1, le=1000)
    """without files of public texts: texts of each label that are taken from clients and made public, at most 20% of a
    label's, or one"""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.files and self.function:
            raise ValueError("files and function are both given: name one of them")
        if self.function and not ENTRY_POINT.fullmatch(self.function):
            raise ValueError(f"function {self.function!r} is not MODULE:FUNCTION")
        if self.prompt and self.label:
            raise ValueError("a prompt is for a language model, whose texts have no label: set label to nothing")
        if self.own_task and not self.label:
            raise ValueError(f"the task {self.task!r} learns labels: name their column with label")
        if self.holdout == "time" and not self.time:
            raise ValueError("holdout = time needs the column of the time: set data.time")
        named = [name for name in (getattr(self, column) for column in COLUMNS) if name]
        if repeated := [name for name in named if named.count(name) > 1]:
            raise ValueError(f"the column {repeated[0]!r} is named twice")
        return self

    @property
    def for_language_model(self) -> bool:
        return self.given and not self.label

    @property
    def own_task(self) -> bool:
        return self.task not in CLASSES

    @property
    def by_word(self) -> bool:
        return self.task == WORDS

    @property
    def given(self) -> bool:
        return bool(self.files or self.function)

    def require_texts(self) -> None:
        """Check that there are texts of one's own, or no other key asks for some. Raises ConfigError."""
        idle = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        if idle and not self.given:
            reason = f"data.{idle[0]} is set, and there are no texts: name them with data.files"
            raise ConfigError(reason, about="data.files")

    def located(self, folder: Path) -> Self:
        named = {"files": self.files, "public": self.public}
        paths = {key: tuple(str((folder / name).resolve()) for name in names) for key, names in named.items()}
        return self.model_copy(update=paths)


@dataclass(frozen=True, slots=True)
class Row:
    """Holds one text with what its columns say. Columns that the settings do not name are empty."""

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
    """Holds what was read. ``broken`` has a line for each broken row: where it stands, and what is wrong."""

    good: Sequence[Row]
    broken: tuple[str, ...]
    cut: int = 0  # texts that were too long
    idle: tuple[str, ...] = ()  # columns of the first row that nothing names, as of DataFacts


def read_rows(settings: DataSettings, seed: int) -> Rows:
    """Read the rows that ``settings`` name, of files and functions; of more than ``sample`` those the seed chooses."""
    placed = _called(settings.function) if settings.function else _chained(settings.files)
    return _rows(placed, settings, _Sample(settings.sample, bool(settings.client), seed))


def _by_word(rows: Rows) -> Rows:
    """Make a row of each word of texts with labels; texts without a word, or with marks, are broken."""
    good, odd = list[Row](), list[str]()
    for row in rows.good:
        try:
            good += [replace(row, text=text, label=label) for text, label in labelled(row.text)]
        except DataError as error:
            odd.append(f"{row.text[:40]!r}: {error}")
    return replace(rows, good=good, broken=(*rows.broken, *odd))


class _Sample:
    """Keeps the rows of some clients, at most ``size`` rows: of those whose names' hashes are smallest, at least one.

    It has to keep no others in memory. Without clients it draws rows, of all of them. Size 0: all rows.
    """

    def __init__(self, size: int, by_client: bool, seed: int) -> None:
        self._size, self._by_client, self._seed = size, by_client, seed
        self._rows: dict[str, list[tuple[int, Row]]] = defaultdict(list)  # client → its rows, with their numbers
        self._largest: list[tuple[int, str]] = []  # a heap of the clients, the largest hash first
        self._bound = math.inf  # clients with this hash or a larger one are out
        self._count = 0  # rows that are kept
        self._number = 0

    def add(self, row: Row) -> None:
        self._number += 1
        client = row.client if self._size and self._by_client else ""
        if client not in self._rows:
            order = _hashed(self._seed, "sample", client)
            if order >= self._bound:
                return
            heapq.heappush(self._largest, (-order, client))
        self._rows[client].append((self._number, row))
        self._count += 1
        while self._size and self._by_client and self._count > self._size and len(self._rows) > 1:
            order, out = heapq.heappop(self._largest)
            self._bound = -order
            self._count -= len(self._rows.pop(out))

    def rows(self) -> list[Row]:
        """The sample, in the order of the files."""
        if self._by_client:
            return [row for _, row in sorted(chain(*self._rows.values()), key=itemgetter(0))]
        rows = [row for _, row in self._rows[""]]
        if not 0 < self._size < len(rows):
            return rows
        drawn = np.random.default_rng(self._seed).choice(len(rows), self._size, replace=False)
        return [rows[at] for at in sorted(drawn)]


def _hashed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def _rows(placed: Iterable[Placed], settings: DataSettings, sample: _Sample) -> Rows:
    broken: list[str] = []
    cut, idle = 0, list[str]()
    for count, (where, fields) in enumerate(placed):
        if count >= MAX_ROWS:
            raise DataError(f"{where}: there are more than {MAX_ROWS} rows", about="data.files")
        if not count and not isinstance(fields, str):
            named = {getattr(settings, key) for key in COLUMNS}
            idle = [key for key in COLUMNS if fields.get(key) is not None and key not in named]
        row = fields if isinstance(fields, str) else _row(fields, settings)
        if isinstance(row, str):
            broken.append(f"{where}: {row}")
            continue
        if settings.long == "cut" and len(row.text) > longest(row.text):
            row, cut = replace(row, text=row.text[:MAX_TEXT]), cut + 1
        sample.add(row)
    return Rows(sample.rows(), tuple(broken), cut, tuple(idle))


def _row(fields: Fields, settings: DataSettings) -> Row | str:
    """Return the row, or what is wrong with it."""
    settings = settings.model_copy(update={"label": ""}) if settings.by_word else settings
    for key in ("text", "label", "prompt", "client", "split", "time", "group"):
        name = getattr(settings, key)
        if name and name not in fields:
            there = ", ".join(map(str, fields))[:MAX_NAME]
            return f"there is no column {name}, only {there}; name it with data.{key}"
        if name and fields[name] is None:
            return f"{name} is missing"
    for column in filter(None, (settings.text, settings.prompt)):
        if wrong := _wrong_text(fields[column], cut=settings.long == "cut" and column == settings.text):
            return f"{column} {wrong}"
    names = {}
    for key in ("label", "client", "split", "group", "language"):
        column = getattr(settings, key)
        read = label_text if settings.own_task and key == "label" else _name
        value = read(fields.get(column)) if column else ""
        if value is None:
            kind = type(fields[column]).__name__
            return f"{column} is a {kind}, and neither a text nor a whole number"
        names[key] = value
        if len(value) > MAX_NAME or not value.isprintable():
            return f"{column} is longer than {MAX_NAME} characters, or not printable"
        if column and key in ("label", "client") and not value:
            return f"{column} is empty"
    if names["split"] not in ("", *SPLITS):
        return f"{settings.split} is {names['split'][:40]!r}, not {', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
    time = _time(fields[settings.time]) if settings.time else 0.0
    if not math.isfinite(time):
        return f"{settings.time} is neither a number nor a time in ISO 8601"
    prompt = fields[settings.prompt] if settings.prompt else ""
    return Row(fields[settings.text], time=time, prompt=prompt, **names)


def _wrong_text(text: object, *, cut: bool) -> str:
    """Say what is wrong with a text; nothing if it can be used."""
    if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
        return "is not a text of Unicode"
    if "\0" in text:
        return f"has a NUL as its character {text.index(chr(0)) + 1}"
    if not text.strip() or (cut and not text[:MAX_TEXT].strip()):
        return "is empty"
    return "" if cut or len(text) <= longest(text) else f"is longer than {longest(text)} characters"


def _name(value: object) -> str | None:
    """The name that a label, a client or a group is; None if it is something else, such as a list or a fraction."""
    if value is None:
        return ""
    return unicodedata.normalize("NFC", str(value)).strip() if isinstance(value, str | int) else None


def _time(value: object) -> float:
    """Parse a time in seconds; NaN if it cannot be read."""
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
            raise ConfigError(f"there is no file or folder {path}", about="data.files")
        yield from ((where, _with_file(fields, path.parent)) for where, fields in _reader(path)(path))


def _reader(path: Path) -> Callable[[Path], Iterator[Placed]]:
    if path.is_dir():
        saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
        return _saved_to_disk if saved else _folder
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        reason = f"{path} is of no known kind; use {', '.join(readers)}, or a folder"
        raise ConfigError(reason, about="data.files")
    return readers[path.suffix.lower()]


def _csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(MAX_FIELD)
    start = 1  # the line on which a row begins; an open quote ends somewhere else
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # In place of a comma, spreadsheets of other languages write other marks.
            marks = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
            first = file.readline()
            delimiter = next((mark for mark in marks if mark in first), marks[0])
            file.seek(0)
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(lines, [])]
            if not header or len(set(header)) != len(header):
                raise DataError(f"{path} has no header, or one that names a column twice", about=path.name)
            start = lines.line_num + 1
            for cells in lines:
                where, start = f"{path}:{start}", lines.line_num + 1
                if not cells:
                    continue  # an empty line
                if len(cells) != len(header):
                    yield where, f"{len(cells)} fields, and the header has {len(header)}"
                elif [cell.strip() for cell in cells] == header:
                    yield where, "the header again"
                else:
                    yield where, dict(zip(header, cells, strict=True))
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; convert it", about=path.name) from None
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not CSV: {error}", about=path.name) from error


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
        value = json.loads(line, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError):
        return "not JSON"
    except ValueError as error:
        return _first_line(error)
    return value if isinstance(value, dict) else "not an object"


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0][:40]!r} is there twice")
    return found


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
    """Read ``LABEL/*.txt`` or ``CLIENT/LABEL/*.txt``: one text a file, under the usual names of the columns, and in the
    same way pictures and sounds."""
    any_text = False
    for path in sorted(folder.rglob("*.*")):
        parts, suffix = path.relative_to(folder).parts[:-1], path.suffix.lower()
        if not path.is_file() or len(parts) not in (1, 2) or suffix not in (".txt", *SUFFIXES):
            continue
        any_text, named = True, {"label": parts[-1], "client": parts[0] if len(parts) == 2 else None}
        try:
            key, content = (
                (SUFFIXES[suffix], path.absolute())
                if suffix in SUFFIXES
                else (TEXT, path.read_text(encoding="utf-8-sig"))
            )
        except UnicodeDecodeError:
            yield str(path), "not UTF-8"
            continue
        yield str(path), {key: content, **named}
    if not any_text:
        reason = f"{folder} has neither LABEL/*.txt nor CLIENT/LABEL/*.txt, nor pictures or sounds in their place"
        raise ConfigError(reason, about="data.files")


def _saved_to_disk(folder: Path) -> Iterator[Placed]:
    """Read a ``Dataset``, or a ``DatasetDict`` whose keys become the column ``split``, with names of class labels."""
    from datasets import Audio, ClassLabel, Dataset, DatasetDict, Image, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # of several libraries
        raise DataError(f"{folder} cannot be read by datasets: {_first_line(error)}", about=folder.name) from error
    parts: dict[str, Dataset] = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    for split, dataset in parts.items():
        names = {key: feature.names for key, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
        for key, feature in dataset.features.items():
            if isinstance(feature, Audio | Image):
                dataset = dataset.cast_column(key, type(feature)(decode=False))
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
            yield f"{name}, row {number}", _with_file(fields, Path())
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        reason = f"{name} failed: {type(error).__name__}: {_first_line(error)}"
        raise DataError(reason, about="data.function") from error


def _with_file(fields: Any, folder: Path) -> Fields | str:
    """Put the file of a column ``image`` or ``audio`` into ``text``, unless there is one: a path from the folder, the
    content or, as Hugging Face's datasets have it, an object of both."""
    if isinstance(fields, str):
        return fields
    if not isinstance(fields, Mapping):
        return "not an object"
    column = next((name for name in FILES if fields.get(name) is not None), None)
    if column is None or TEXT in fields:
        return fields
    value = fields[column]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        content = value if isinstance(value, bytes) else read(folder / str(value), MAX_SOURCE)
        return {**fields, TEXT: FILES[column].of_file(content)}
    except (DataError, OSError, ValueError) as error:
        return f"{column}: {error.strerror if isinstance(error, OSError) else error}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def partition(labels: Sequence[str], settings: DataSettings, seed: int) -> list[int]:
    """Return the client of each row, from 0; a client may get no row. Equal arguments give equal clients.

    Raises ConfigError if the rule cannot make that number of clients from these rows.
    """
    from datasets import Dataset
    from flwr_datasets import partitioner as rules

    order, count = np.random.default_rng(seed).permutation(len(labels)), settings.clients
    rule: rules.Partitioner = {
        "iid": lambda: rules.IidPartitioner(count),
        "dirichlet": lambda: rules.DirichletPartitioner(
            count, "label", settings.concentration, min_partition_size=0, seed=seed
        ),
        "shard": lambda: rules.ShardPartitioner(count, "label", num_shards_per_partition=settings.shards, seed=seed),
        "linear": lambda: rules.LinearPartitioner(count),
        "exponential": lambda: rules.ExponentialPartitioner(count),
    }[settings.partition]()
    owner = [0] * len(labels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each attempt at a Dirichlet draw
            rule.dataset = Dataset.from_dict({"row": order.tolist(), "label": [labels[row] for row in order]})
            for client in range(count):
                for row in rule.load_partition(client)["row"]:
                    owner[row] = client
    except ValueError as error:
        reason = f"{len(labels)} texts cannot be dealt out to {settings.clients} clients by {settings.partition}"
        raise ConfigError(f"{reason}: {' '.join(str(error).split())[:200]}", about="data.partition") from error
    return owner


def normalized(text: str) -> str:
    """Return what near-duplicates share: no case, punctuation or white space, and every number as 0.

    Combining marks and symbols stay: they tell words apart in Hindi, and C++ from C#.

    >>> normalized("Turn it to 21 °C,  please!")
    'turn it to 0 °c please'
    """
    if is_medium(text):
        return text
    composed = unicodedata.normalize("NFC", text).casefold()
    return _SPACES.sub(" ", _NUMBERS.sub("0", composed.translate(_KEPT))).strip()


class _Kept(dict[int, str | None]):
    """What ``normalized`` makes of a character: itself, a space, or nothing."""

    def __missing__(self, code: int) -> str | None:
        char = chr(code)
        match unicodedata.category(char)[0]:
            case "P" if char not in WRITTEN:
                kept: str | None = " "
            case "Z" | "C":
                # A joiner stands within a word or an emoji.
                kept = None if unicodedata.category(char) == "Cf" else " "
            case _:
                kept = char
        self[code] = kept
        return kept


_KEPT = _Kept()


def group_texts(texts: Sequence[str], keys: Sequence[str], threshold: float) -> list[int]:
    """Return the group of each text, as the index of the group's first text.

    Texts whose sets of three-character pieces have a Jaccard index of at least ``threshold``, from 0.3 to 1, are in one
    group, as are those with an equal key that is not empty, and those that a chain of such pairs connects. The index is
    estimated from 64 hashes (Broder 1997; its standard deviation is at most 0.0625) for pairs that locality-sensitive
    hashing finds (Indyk and Motwani 1998); at 1, only texts that ``normalized`` makes equal are in one group.
    """
    first, keyed, lowest = dict[str, int](), dict[str, int](), dict[int, int]()
    pairs = [(first.setdefault(normalized(text), index), index) for index, text in enumerate(texts)]
    pairs += [(keyed.setdefault(key, index), index) for index, key in enumerate(keys) if key]
    written = [(text, index) for text, index in first.items() if not is_medium(text)]
    pairs += _similar(written, threshold) if threshold < 1 else ()
    ends = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (ends[0], ends[1])), shape=(len(texts), len(texts)))
    _, components = connected_components(graph, directed=False) if texts else (0, [])
    return [lowest.setdefault(number, index) for index, number in enumerate(components)]


def _similar(distinct: Sequence[tuple[str, int]], threshold: float) -> Iterator[tuple[int, int]]:
    rows = 4 if threshold >= 0.7 else 2  # of a band: a pair at the threshold is found with a probability of 0.95
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
    sketches: dict[int, MinHash] = {}
    for text, number in distinct:
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(sorted({text[i : i + SHINGLE].encode() for i in range(max(1, len(text) - SHINGLE + 1))}))
        for other in index.query(sketch):
            if sketches[other].jaccard(sketch) >= threshold:
                yield other, number
        sketches[number] = sketch
        index.insert(number, sketch)


@dataclass(frozen=True, slots=True)
class DataFacts:
    rows: int  # rows that are used, broken ones not counted
    broken: tuple[str, ...]  # a line for each broken row
    groups: int  # groups of near-duplicates among the rows
    small: int  # clients that were left out: too few texts, or nothing to train or test on
    overlapping: int  # test texts that were left out, because a near-duplicate is in somebody's training part
    leaked: int  # test texts of the data's own split of which a near-duplicate is in somebody's training part
    cut: int  # texts that were too long
    taken: int  # texts that were taken from clients: public ones and their near-duplicates
    rare: tuple[str, ...]  # labels of which no text was taken: they have too few
    conflicting: tuple[str, ...]  # texts that stand there with several labels, as ``normalized`` makes them
    variants: tuple[str, ...]  # labels that differ in case, punctuation, space or zeros only: "A = a", "01 = 1"
    unsaid: tuple[str, ...]  # labels that say that there is none, such as NA
    lists: tuple[str, ...]  # labels that are lists or objects, written as text
    idle: tuple[str, ...]  # columns of the first row that are named like a key of [data], which names no column
    dealt: bool  # no column said whose the texts are


@dataclass(frozen=True, slots=True)
class Loaded:
    population: Population
    facts: DataFacts | None  # None if no rows were read


def load_population(settings: DataSettings, seed: int) -> Loaded:
    """Read the texts and make a population of them; the same texts, settings and seed give the same ``digest``."""
    rows, task = read_rows(settings, seed), find_task(settings.task)
    only = settings.model_copy(update={"client": "", "split": "", "time": "", "group": ""})  # of public texts
    public = _rows(_chained(settings.public), only, _Sample(0, False, 0))
    names, targets = tuple[str, ...](), dict[str, Target]()
    if settings.by_word:
        rows, public = _by_word(rows), _by_word(public)
    if isinstance(task, OwnTask):
        rows, public, names, targets = _with_targets(rows, public, task)
    broken = rows.broken + public.broken
    if not rows.good:
        why = f"none of the {len(broken)} rows can be used; {broken[0]}" if broken else "there are no rows of texts"
        raise DataError(why, about="data.files")
    if broken and settings.broken == "refuse":
        more = f" (and {len(broken) - 1} more rows)" if len(broken) > 1 else ""
        reason = f"{broken[0]}{more}; mend it, or leave such rows out with data.broken = skip"
        raise DataError(reason, about="data.files")
    return _Maker(settings, seed, rows, public, names, targets).make(broken)


def _with_targets(rows: Rows, public: Rows, task: OwnTask) -> tuple[Rows, Rows, tuple[str, ...], dict[str, Target]]:
    """Name the outputs of a task of others, and map each label to its target; rows whose label it refuses are broken.

    Raises DataError: the task fails.
    """
    labels = sorted({row.label for row in (*rows.good, *public.good)})
    names, targets, refused = task.outputs(labels) if labels else (), dict[str, Target](), dict[str, str]()
    for label in labels:
        try:
            targets[label] = task.target(label, names)
        except ValueError as error:
            refused[label] = f"label {label[:40]!r}: {_first_line(error)}"

    def usable(part: Rows) -> Rows:
        odd = tuple(f"{row.text[:40]!r}, {refused[row.label]}" for row in part.good if row.label in refused)
        return replace(part, good=[row for row in part.good if row.label in targets], broken=part.broken + odd)

    return usable(rows), usable(public), names, targets


class _Maker:
    """Makes clients of rows in steps; each reads what those before it left."""

    def __init__(
        self,
        settings: DataSettings,
        seed: int,
        rows: Rows,
        public: Rows,
        outputs: tuple[str, ...],
        targets: Mapping[str, Target],
    ) -> None:
        self.settings, self.seed = settings, seed
        self.rows, others, self.cut, self.idle = rows.good, public.good, rows.cut + public.cut, rows.idle
        labels = {row.label for row in (*self.rows, *others)}
        self.labels = outputs or (tuple(sorted(labels)) if settings.label else ())
        self.targets, self.words = targets, settings.by_word
        if settings.label and len(labels) < 2:
            reason = f"the {len(self.rows)} texts have {len(labels)} different labels; at least 2 are needed"
            raise ConfigError(reason, about="data.label")
        texts = [unmarked(row.text) for row in (*self.rows, *others)]
        keys = [row.group for row in (*self.rows, *others)]
        self.groups = group_texts(texts, keys, settings.near_duplicates)
        self.number = {label: index for index, label in enumerate(self.labels)} or {"": NO_LABEL}
        self.public_groups = set(self.groups[len(self.rows) :])
        self.public = [self._labelled(row, self.groups[len(self.rows) + at]) for at, row in enumerate(others)]

    def make(self, broken: tuple[str, ...]) -> Loaded:
        taken, rare = (set[int](), ()) if self.public else self._take_public()
        left = [at for at in range(len(self.rows)) if at not in taken]
        owned, small = self._owned(left)
        side = self._sides(owned)
        leaked = overlapping = 0
        if self.settings.split or self.settings.holdout == "time":
            learned = {self.groups[at] for at, part in side.items() if part != TEST} | self.public_groups
            repeated = [at for at, part in side.items() if part == TEST and self.groups[at] in learned]
            if self.settings.split:
                leaked = len(repeated)
            else:
                overlapping = len(repeated)
                side = {at: part for at, part in side.items() if at not in set(repeated)}
        made = [self._client(name, members, side) for name, members in owned.items()]
        clients = [client for client in made if client is not None]
        small += len(made) - len(clients)
        facts = DataFacts(
            len(self.rows),
            broken,
            len(set(self.groups)),
            small,
            overlapping,
            leaked,
            self.cut,
            len(taken),
            rare,
            self._conflicting(),
            _variants(self.labels),
            tuple(label for label in self.labels if label.casefold() in NOTHING_SAID),
            tuple(label for label in self.labels if LISTED.fullmatch(label)),
            self.idle,
            not self.settings.client,
        )
        return Loaded(Population(self.labels, tuple(self.public), self._named(clients)), facts)

    def _conflicting(self) -> tuple[str, ...]:
        labels: dict[str, set[str]] = defaultdict(set)
        for row in () if self.words else self.rows:
            labels[normalized(row.text)].add(row.label)
        return tuple(text for text, several in labels.items() if len(several) > 1)

    def _order(self, group: int) -> int:
        """Return a group's place in the order that decides its use, by its first text, on any machine."""
        first = self.rows[group].text if group < len(self.rows) else self.public[group - len(self.rows)].text
        return _hashed(self.seed, "group", first)

    def _labelled(self, row: Row, group: int) -> LabelledText:
        number, target = self.number.get(row.label, NO_LABEL), self.targets.get(row.label, ())
        return LabelledText(row.text, NO_LABEL if target else number, f"g{group}", row.prompt, target)

    def _kind(self, row: Row) -> str:
        """Return what texts are dealt out by: the label, or nothing where labels are not classes."""
        return "" if self.targets or self.words else row.label

    def _take_public(self) -> tuple[set[int], tuple[str, ...]]:
        """Make some texts of each label public, with all of their groups: at most ``PUBLIC_SHARE`` of a label's texts,
        or one.

        Returns the rows of their groups, which no client keeps, and the labels that have too few texts for one. Raises
        ConfigError: these are all labels.
        """
        members: dict[int, list[int]] = defaultdict(list)
        for at in range(len(self.rows)):
            if self.rows[at].split in ("", TRAIN):
                members[self.groups[at]].append(at)
        order = sorted(members, key=lambda group: (len(members[group]), self._order(group)))
        sizes_of, most = Counter(map(self._kind, self.rows)), self.settings.public_texts
        most *= len(self.labels) if self.targets or self.words else 1
        left = {label: max(float(size > 1), PUBLIC_SHARE * size) for label, size in sizes_of.items()}
        count: Counter[str] = Counter()
        for group in order:
            first, sizes = self.rows[members[group][0]], Counter(self._kind(self.rows[at]) for at in members[group])
            if count[self._kind(first)] < most and all(left[name] >= sizes[name] for name in sizes):
                count[self._kind(first)] += 1
                for name, size in sizes.items():
                    left[name] -= size
                self.public_groups.add(group)
                shown = [self.rows[at] for at in members[group]] if self.words else [first]
                self.public += [self._labelled(row, group) for row in shown]
        self.public.sort(key=lambda text: text.label)
        if not self.public:
            reason = "no label has a text to make public and another one, which is no near-duplicate, for the clients"
            raise ConfigError(f"{reason}: name files of public texts with data.public", about="data.public")
        taken = {at for at in range(len(self.rows)) if self.groups[at] in self.public_groups}
        known = {text.label for text in self.public}
        return taken, tuple(label for label, number in self.number.items() if not self.targets and number not in known)

    def _owned(self, left: Sequence[int]) -> tuple[dict[str, list[int]], int]:
        """Map each client to its rows, and count the clients that had too few."""
        if self.settings.client:
            names = [self.rows[at].client for at in left]
        else:
            units = [self.groups[at] if self.words else at for at in left]  # the words of a text stay together
            kinds = {unit: self._kind(self.rows[at]) for unit, at in zip(units, left, strict=True)}
            owner = dict(zip(kinds, partition([*kinds.values()], self.settings, self.seed), strict=True))
            names = [f"client-{owner[unit] + 1:04d}" for unit in units]
        owned: dict[str, list[int]] = defaultdict(list)
        for name, at in zip(names, left, strict=True):
            owned[name].append(at)
        enough = {name: owned[name] for name in sorted(owned) if len(owned[name]) >= self.settings.minimum_texts}
        return enough, len(owned) - len(enough)

    def _sides(self, owned: Mapping[str, Sequence[int]]) -> dict[int, str]:
        """Return TEST or TRAIN (or, from the data's own split, VALIDATION) for each row."""
        if self.settings.split:
            return {at: self.rows[at].split or TRAIN for members in owned.values() for at in members}
        if self.settings.holdout == "time":
            side: dict[int, str] = {}
            for members in owned.values():
                latest = sorted(members, key=lambda at: (self.rows[at].time, at))
                tests = max(1, round(self.settings.holdout_fraction * len(members)))
                side |= {at: TEST if place >= len(members) - tests else TRAIN for place, at in enumerate(latest)}
            return side
        tested = self._tested_groups(owned)
        return {at: TEST if self.groups[at] in tested else TRAIN for members in owned.values() for at in members}

    def _tested_groups(self, owned: Mapping[str, Sequence[int]]) -> set[int]:
        """Return the groups for tests. Each client gets its share of them, in the order of hashes."""
        tested: set[int] = set()
        settled = set(self.public_groups)
        for members in owned.values():
            sizes = Counter(self.groups[at] for at in members)
            target = max(1, round(self.settings.holdout_fraction * len(members)))
            have = sum(size for group, size in sizes.items() if group in tested)
            for group in sorted(sizes, key=self._order):
                if group in settled:
                    continue
                settled.add(group)
                # Not a group that would leave the client too little to learn from.
                if have < target and have + sizes[group] <= len(members) // 2:
                    tested.add(group)
                    have += sizes[group]
        return tested

    def _client(self, name: str, members: Iterable[int], side: Mapping[int, str]) -> Client | None:
        """Make a client; None if one of its parts would be empty."""
        parts: dict[str, list[int]] = {TRAIN: [], VALIDATION: [], TEST: []}
        for at in members:
            if at in side:
                parts[side[at]].append(at)
        if not parts[VALIDATION]:
            self._hold_out(parts[TRAIN], parts[VALIDATION])
        if not all(parts.values()):
            return None
        languages = Counter(self.rows[at].language for part in parts.values() for at in part)
        texts = {
            part: tuple(self._labelled(self.rows[at], self.groups[at]) for at in found) for part, found in parts.items()
        }
        return Client(name, languages.most_common(1)[0][0], False, texts[TRAIN], texts[VALIDATION], texts[TEST])

    def _hold_out(self, train: list[int], validation: list[int]) -> None:
        """Move whole groups of a client from ``train`` to ``validation``, up to its share."""
        sizes = Counter(self.groups[at] for at in train)
        target, chosen, have = max(1, round(self.settings.validation_fraction * len(train))), set(), 0
        for group in sorted(sizes, key=self._order):
            if have < target and have + sizes[group] <= max(1, len(train) // 2):
                chosen.add(group)
                have += sizes[group]
        validation.extend(at for at in train if self.groups[at] in chosen)
        train[:] = [at for at in train if self.groups[at] not in chosen]

    def _named(self, clients: Sequence[Client]) -> tuple[Client, ...]:
        """Return the clients, those that take part first, under names that devices can have."""
        unseen = max(1, round(self.settings.unseen * len(clients)))
        if len(clients) - unseen < FEWEST_TRAINED:
            reason = f"{len(clients)} clients have enough texts, of which {unseen} take no part in training; at least "
            reason += f"{FEWEST_TRAINED} must train: give more texts, or lower data.minimum_texts"
            raise ConfigError(reason, about="data.client")
        order = sorted(clients, key=lambda client: _hashed(self.seed, "unseen", client.name))
        out = {client.name for client in order[:unseen]}
        usable = all(is_device_id(client.name) for client in clients)
        usable = usable and len({client.name.casefold() for client in clients}) == len(clients)
        sorted_clients = sorted(clients, key=lambda client: (client.name in out, client.name))
        return tuple(
            replace(client, name=client.name if usable else f"client-{number:04d}", unseen=client.name in out)
            for number, client in enumerate(sorted_clients, 1)
        )


def _variants(labels: Iterable[str]) -> tuple[str, ...]:
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        as_number = re.sub(r"(?<![\d.])0+(?=\d)|(?<=\d)\.0+(?!\d)", "", label)
        alike[" ".join(re.split(r"[\W_]+", as_number.casefold())).strip() or label].append(label)
    return tuple(" = ".join(names) for names in alike.values() if len(names) > 1)
