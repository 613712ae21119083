"""The bundle that a device opens: one base, any number of adapters, each described by a signed document.

::

    DIR/base/model.onnx  web.onnx  model.onnx.data  tokenizer.json  card.json
    DIR/adapters/NAME.onnx_adapter  NAME.json

A bundle is only ever replaced whole (``adapters.storage.staged``).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from adapters.files import sha256
from adapters.layout import Layout, Tensors
from adapters.manifest import AdapterManifest, BaseManifest
from adapters.ondevice import LORA_A, Format, check_labels, check_name, check_slots, to_graph
from adapters.peftconfig import PeftConfig
from adapters.storage import link_files, locked_folder, staged, write_files
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from export.bundle import adapter
from export.onnx.slots import LABELS, AdapterInputs

if TYPE_CHECKING:  # it brings torch, which an adapter's export does without
    from export.bundle.base import ExportedBase

CARD = Path("base", "card.json")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter to be exported, and what its manifest says of it."""

    name: str  # "global", or the owner's name for a private one
    tensors: Tensors = field(repr=False)  # under peft's names
    labels: tuple[str, ...]  # the head's rows, in order
    version: int
    sha256: str  # of the safetensors blob that the tensors come from
    parent: str | None = None  # of a private adapter: the blob digest of the global version it started from
    method: PeftConfig | None = None  # how it was made; without it peft gets it back with its scaling folded in
    plan: AdapterInputs | None = None  # of the model that the tensors come from; the exported base's if None


def write_bundle(
    out: Path, exported: "ExportedBase", sources: Sequence[AdapterSource], *, key: IdentityKey, form: Format = "int8"
) -> None:
    """Write a bundle to ``out``, replacing the bundle that may be there.

    Adapters already in ``out`` for the same base stay, unless one of ``sources`` has their name: a household's private
    adapter outlives an update of the shared one.

    Args:
        out: The bundle's folder.
        exported: The base; export it once and use it for as many bundles as there are.
        sources: The adapters.
        key: Signs the card and the sidecars.
        form: The adapters' number format.

    Raises:
        ConfigError: ``out`` is something other than a bundle or keeps adapters that would not fit the base any more, an
            adapter's name cannot be a file's, or an adapter of a language model comes without its plan.
        DataError: An adapter does not fit the base, is above its highest rank, or has labels that are not
            its rows, or that no device takes.
        OSError: The folder cannot be written. What was in ``out`` is still there.
    """
    with locked_folder(out) as whole:
        _write_bundle(whole, exported, sources, key, form)


def _write_bundle(
    out: Path, exported: "ExportedBase", sources: Sequence[AdapterSource], key: IdentityKey, form: Format
) -> None:
    check_place(out)
    card = exported.card
    files = {f"base/{name}": blob for name, blob in exported.files.items()}
    files[CARD.as_posix()] = card.sign(key)
    for source in sources:
        if source.plan is None and exported.task == "text-generation":
            raise ConfigError(f"adapter {source.name!r} comes without its plan, which has the scaling of its layers")
        files |= _adapter_files(source, source.plan or exported.plan, card, key, form)
    kept = _kept(out, card, {source.name for source in sources})
    with staged(out, replaces=True) as stage:
        if kept:
            link_files(out / "adapters", stage / "adapters")
        write_files(stage, files)


def _kept(out: Path, card: BaseManifest, renewed: set[str]) -> bool:
    """Whether the adapters in ``out`` are for the base of ``card``; those that are ``renewed`` need not fit it."""
    old = stated_manifest(out)
    if old is None or old.base_digest != card.base_digest:
        return False
    names = {path.stem for path in (out / "adapters").glob("*.json")} - renewed
    if names and old.slots != card.slots:
        raise ConfigError(
            f"the adapters in {out} ({', '.join(sorted(names))[:200]}) were made for a base with other slots, and no "
            "device would take them any more; name another folder, or the same --targets and --head"
        )
    return True


def add_adapter(
    bundle: Path, found: AdapterInputs, source: AdapterSource, *, key: IdentityKey, form: Format = "int8"
) -> None:
    """Add or replace one adapter in a bundle: a household's private one, signed by the device's own key.

    Args:
        bundle: A bundle that ``write_bundle`` made.
        found: The plan of the model that the adapter was trained in (``export.plan.plan``).
        source: The adapter.
        key: Signs the sidecar.
        form: The adapter's number format.

    Raises:
        ConfigError: ``bundle`` is no bundle, or the adapter's name cannot be a file's.
        DataError: The adapter does not fit the plan, or has labels that are not
            its rows, or that no device takes.
        OSError: The folder cannot be written. The bundle is as it was.
    """
    with locked_folder(bundle) as whole:
        if (card := stated_manifest(whole)) is None:
            raise ConfigError(f"{whole} is not a bundle: it has no {CARD}")
        files = _adapter_files(source, found, card, key, form)
        with staged(whole, replaces=True) as stage:
            link_files(whole, stage)
            write_files(stage, files)


def copy_bundle(bundle: Path, out: Path) -> None:
    """Give ``bundle`` a second home at ``out``, replacing the bundle that may be there; files are shared by hard links.

    Raises:
        ConfigError: ``bundle`` is no bundle, or ``out`` is something other than one.
        OSError: The folder cannot be written. What was in ``out`` is still there.
    """
    if stated_manifest(bundle) is None:
        raise ConfigError(f"{bundle} is not a bundle: it has no {CARD}")
    with locked_folder(out) as whole:
        check_place(whole)
        with staged(whole, replaces=True) as stage:
            link_files(bundle, stage)


def _adapter_files(
    source: AdapterSource, found: AdapterInputs, card: BaseManifest, key: IdentityKey, form: Format
) -> dict[str, bytes]:
    path = f"adapters/{check_name(source.name)}"
    tensors, found = adapter.completed(source.tensors, found, card.slots)
    blob = adapter.encode(tensors, found, form)
    sizes = check_slots(to_graph(tensors, found.scaling), card.slots)
    if sizes.get(LABELS, 2) < 2:
        raise DataError(f"adapter {source.name!r} has a head of one row; a device chooses among two labels at least")
    if sizes.get(LABELS, len(source.labels)) != len(source.labels):
        raise DataError(
            f"adapter {source.name!r} has {len(source.labels)} labels for {sizes[LABELS]} rows of its head; name each "
            "row, in order (--labels)"
        )
    check_labels(source.name, source.labels)
    ranks = [value.shape[0] for name, value in tensors.items() if name.endswith(LORA_A)]
    if (rank := max(ranks, default=0)) > card.max_rank:
        raise DataError(f"adapter {source.name!r} has rank {rank}, the base takes at most {card.max_rank} (--max-rank)")
    sidecar = AdapterManifest(
        name=source.name,
        sha256=sha256(blob),
        size=len(blob),
        format=form,
        base_digest=card.base_digest,
        layout_digest=Layout.of(tensors).digest,
        version=source.version,
        source=source.sha256,
        method=source.method,
        parent=source.parent,
        rank=rank,
        labels=source.labels,
    )
    return {f"{path}.onnx_adapter": blob, f"{path}.json": sidecar.sign(key)}


def check_place(out: Path) -> None:
    """Return if ``out`` is free for a bundle, or holds one that may be replaced.

    Raises:
        ConfigError: It is something else, or nothing can be written beside it.
    """
    if out.exists() and not (out / CARD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a bundle; name another folder")
    above = next(folder for folder in out.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{above} is no folder that can be written to; name another place than {out}")


def stated_manifest(bundle: Path) -> BaseManifest | None:
    """What the card says, unverified: only the exporter relies on it; a device verifies it before it believes it."""
    try:
        body = json.loads((bundle / CARD).read_bytes())["body"]
        return TypeAdapter(BaseManifest).validate_python(body)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{bundle / CARD} is damaged; move {bundle} away and export again") from error
