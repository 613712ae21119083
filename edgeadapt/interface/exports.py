"""``edgeadapt.export``: an adapter in a bundle that devices open."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from aggregation.errors import ConfigError
from edgeadapt.formats.bundle import TRUST
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.storage import PUBLIC, File, create, real
from edgeadapt.interface.models import Classifier, LanguageModel, load
from edgeadapt.interface.names import check_choice, check_texts, in_python
from edgeadapt.methods.peft.folder import CONFIG
from export.addition import Wanted, add_to
from export.bundle.sources import origin_of


def export(
    source: File | Any,
    *,
    bundle: File,
    key: File,
    base: File | None = None,
    labels: Sequence[str] = (),
    adapter: str = "global",
    version: int | None = None,
    format: Format = "int8",
    profile: str | None = None,
    calibrate: File | None = None,
    trust: File | None = None,
    policy: File | None = None,
    card: File | None = None,
) -> Classifier | LanguageModel:
    """Put an adapter into a bundle, sign it, and load the bundle.

    Args:
        source: A ``PeftModel``, a folder that peft saved, or a coordinator's state directory.
        bundle: The bundle; a new one needs ``base``. If nothing is pinned next to it, ``trust.pem`` there gets the
            public half of ``key``.
        key: The private key that signs; ``edgeadapt bundle key`` makes one.
        base: The frozen model: a folder, or a package that carries it. DoRA needs its weights.
        labels: Of a classifier's head, in order; a registry states them itself, and peft does not.
        adapter: Its name on devices.
        version: By default the newest of a registry, and of another source the one after the bundle's.
        format: Of the adapter's numbers.
        profile: How the weights of a new bundle's base are stored; by default ``native-int8``.
        calibrate: A file of held-out phrases to which probabilities are fitted: lines of a label, a tab and a phrase.
        trust: Public keys that may have signed a registry; by default its own.
        policy: A TOML file of what the bundle may answer from now on; by default it keeps its own.
        card: A TOML file of owner, purpose, data, license and languages.

    Raises:
        ConfigError: An argument is missing or does not fit, or the adapter is for another base.
        DataError: The adapter does not fit its base or its labels, or is older than the bundle's.
        TrustError: The registry is not what its key signed, or the pinned keys do not have ``key``.
    """
    check_texts("labels", labels)
    check_choice("format", format, get_args(Format))
    out, files = Path(bundle), (None if one is None else Path(one) for one in (calibrate, policy, card))
    calibration, rules, stated = files
    with in_python(), ExitStack() as stack:
        signer = read_key(Path(key))
        if isinstance(source, (str, PathLike)):
            folder = Path(source)
        elif hasattr(source, "save_pretrained"):
            folder = Path(stack.enter_context(TemporaryDirectory()))
            source.save_pretrained(folder)
        else:
            reason = f"source is a {type(source).__name__}: give a PeftModel, or a folder"
            raise ConfigError(reason, about="source")
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}", about="source")
        saved = (folder / CONFIG).exists()
        if saved and trust is not None:
            raise ConfigError("trust= is for a registry: leave it out", about="trust")
        registry, peft = (None, folder) if saved else (folder, None)
        origin = origin_of(registry, peft, version, None if trust is None else Path(trust), labels)
        counted = version is not None or not saved
        named = None if base is None else str(base)
        add_to(out, origin, signer, Wanted(adapter, format, named, profile, calibration, counted, rules, stated))
        with suppress(FileExistsError):
            create(real(out).parent / TRUST, signer.public.to_pem(), PUBLIC)
        return load(out, adapter=adapter)
