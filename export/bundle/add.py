"""One adapter into a bundle, from wherever it comes; without torch."""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from adapters.manifest import AdapterManifest
from adapters.ondevice import Format, check_name
from aggregation.errors import ConfigError, DataError
from aggregation.pki.identity import IdentityKey
from export.bundle.sources import Origin
from export.bundle.write import CARD, AdapterSource, add_adapter, stated_manifest
from export.onnx.slots import plan_of


def add(bundle: Path, origin: Origin, *, name: str, form: Format, key: IdentityKey) -> AdapterManifest:
    """Add ``origin`` to ``bundle`` under ``name``, and return what is now signed about it.

    Raises:
        ConfigError: No bundle, a name that no file can have, an adapter for another base, or labels missing.
        DataError: The adapter does not fit the base, or devices would refuse its version as a step back.
    """
    if (card := stated_manifest(bundle)) is None:
        raise ConfigError(f"{bundle} is not a bundle: it has no {CARD}; make one with 'edgeadapt export base'")
    if origin.base_digest not in (None, card.base_digest):
        raise ConfigError(
            f"the adapter was made for the base {str(origin.base_digest)[:12]}, {bundle} holds {card.base_digest[:12]}"
        )
    before = _stated(bundle, name)
    if before is not None and before.version > origin.version:
        raise DataError(
            f"{bundle} has version {before.version} of {name!r} already; devices refuse the older {origin.version}"
        )
    source = AdapterSource(name, origin.tensors, origin.labels, origin.version, origin.sha256, method=origin.method)
    add_adapter(bundle, plan_of(origin.method, origin.tensors), source, key=key, form=form)
    if (after := _stated(bundle, name)) is None:
        raise DataError(f"{bundle} lost its adapter {name!r} while it was written; is another export at work?")
    return after


def _stated(bundle: Path, name: str) -> AdapterManifest | None:
    """What the adapter's sidecar says, unverified: devices remember versions, this only spares them a bad one."""
    try:
        body = json.loads((bundle / "adapters" / f"{check_name(name)}.json").read_bytes())["body"]
        return TypeAdapter(AdapterManifest).validate_python(body)
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, KeyError, TypeError):
        return None  # damaged: it is about to be replaced
