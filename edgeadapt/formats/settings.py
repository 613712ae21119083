"""Settings in a TOML file: read and checked by a pydantic model, changed key by key, written with a comment on each.
The settings of a federation, of a device and of a scenario are such models."""

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import MAX_DEPTH, check_depth

LONGEST = 2**16  # bytes of a file; ours have about 4000
LONGEST_LINE = 2**11  # characters outside of texts: the time to read a dotted key grows with the square of its parts
LONGEST_KEY = 200  # characters of a key in an error
_TEXT = re.compile(r'"[^"\\\n]*"')


class Settings(BaseModel):
    """A table of settings. Unknown keys, infinity and NaN are refused; the text below a field is its comment."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    longest: ClassVar[int] = LONGEST  # bytes of a file

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for info in cls.model_fields.values():
            info.description = " ".join((info.description or "").split())

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file, changed by ``overridden``. ``read`` of what ``to_toml`` returned gives the same settings. Raises
        ConfigError: the file is missing, too large or not TOML, a key is unknown, or a value is out of range."""
        try:
            table = _toml(storage.read(path, cls.longest).decode())
        except DataError as error:
            raise ConfigError(str(error), about=error.about) from error
        except ValueError as error:
            raise ConfigError(f"{path} is not TOML: {error}", about=path.name) from error
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigError(f"there is no file {path}", about=path.name) from error
        return cls.parse(overridden(table, overrides), str(path))

    @classmethod
    def parse(cls, table: dict[str, Any] | bytes, where: str) -> Self:
        """Check a parsed table or JSON, which an error names as ``where``. Raises as ``read``."""
        try:
            # As JSON: then strict accepts a list for a tuple, and still neither true nor "5" for a number.
            raw = table if isinstance(table, bytes) else json.dumps(table, default=str)
            return cls.model_validate_json(raw, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))[:LONGEST_KEY]
            reason = first["msg"].removeprefix("Value error, ")
            line = f"{key}: {reason}" if key else reason
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(key, [known for known, _ in cls.fields()], n=1)
                line = f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            raise ConfigError(f"{where}: {line}", about=key) from error

    @classmethod
    def fields(cls) -> Iterator[tuple[str, FieldInfo]]:
        return _fields(cls, "")

    def to_toml(self) -> str:
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        tables: dict[str, Settings] = {}
        for key, info in type(self).model_fields.items():
            value = getattr(self, key)
            if isinstance(value, Settings):
                tables[key] = value
            else:
                yield f"{key} = {toml_value(value)}  # {info.description}"
        for key, table in tables.items():
            yield from ("", f"[{key}]  # {(table.__doc__ or '').partition(chr(10))[0]}", *table._lines())


def _toml(text: str) -> dict[str, Any]:
    """Parse a TOML text. Raises ValueError if it is not TOML, has a line above the limit, or is nested too deeply."""
    if max(map(len, _TEXT.sub('""', text).split("\n"))) > LONGEST_LINE:
        raise ValueError(f"a line has more than {LONGEST_LINE} characters")
    try:
        table = tomllib.loads(text)
        check_depth(table)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    return table


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def toml_value(value: object) -> str:
    """Write a value in TOML, in one line.

    >>> toml_value(["active", 0.5]), toml_value({"momentum": 0.5})
    ('["active", 0.5]', '{"momentum" = 0.5}')
    """
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_value(str(key))} = {toml_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip()


def overridden(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a parsed TOML table with some values changed.

    >>> overridden({"rounds": 3}, ["rounds=5", "training.epochs=2"])
    {'rounds': 5, 'training': {'epochs': 2}}

    ``overrides`` are ``KEY=VALUE`` with a dotted key; a value is TOML, or a text where it is not.

    Raises ConfigError: an override has another form, or a part of its key names a value instead of a table."""
    changed = copy.deepcopy(table)
    for override in overrides:
        key, equals, text = override.partition("=")
        *path, last = key.strip().split(".")
        if not equals or not last or len(path) > MAX_DEPTH:
            raise ConfigError(f"--set takes KEY=VALUE, not {override[:80]!r}", about="--set")
        try:
            document = _toml(f"value = {text}")
        except ValueError:
            document = {"value": text}
        value = document["value"] if len(document) == 1 else text  # a line break in it could begin a second key
        into = changed
        for name in path:
            into = into.setdefault(name, {})
            if not isinstance(into, dict):
                raise ConfigError(f"--set {key}: {name!r} is a value, not a table", about="--set")
        into[last] = value
    return changed
