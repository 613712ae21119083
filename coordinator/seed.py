"""Version 0 of the registry: the adapter that the first round starts from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from aggregation.errors import ConfigError
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.bases.base import OwnModel, find_base, with_task
from edgeadapt.bases.tasks import CLASSES, CLASSIFICATION
from edgeadapt.formats import files
from edgeadapt.formats.graphinputs import input_name, layer_of
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.peftconfig import OWN, PeftConfig, require_trainable
from edgeadapt.formats.storage import read_lines
from edgeadapt.methods.parts import HEAD
from edgeadapt.methods.peft.folder import LABELS, read_peft
from edgeadapt.methods.peft.inputs import AdapterInputs, is_saved
from edgeadapt.methods.peft.lowrank import as_lora
from edgeadapt.methods.peft.methods import from_peft_tensors, to_peft_tensors

ENCODER = "encoder."  # begins the path of every layer below it
PARAMETERS = {"weight", "bias"}


def publish_first(
    state_dir: CoordinatorStateDir,
    folder: Path | None,
    base: str,
    labels: Sequence[str] | None,
    task: str = CLASSIFICATION,
) -> VersionManifest:
    """Sign the adapter that peft saved in ``folder``, and publish it as version 0.

    An ``OwnModel`` has no folder: its own parameters are published. ``labels``: of the head, in order; None: those in
    ``LABELS`` in the folder, which a language model does not have. ``task``: what devices learn of labels. Raises
    ConfigError: there is a version already, the settings have rounds that the task does not have, or as
    ``seed_version``; DataError as ``read_peft``."""
    with state_dir.locked():
        if (latest := state_dir.registry.latest()) is not None:
            text = f"{state_dir.folder} has version {latest.manifest.version} already: the first adapter is published "
            text += "once"
            raise ConfigError(text, about="version")
        frozen = with_task(find_base(base), task)
        if task not in CLASSES and state_dir.settings.analytic.rounds:
            reason = f"the analytic head is of classification, and the task is {task!r}: set analytic.rounds to 0"
            raise ConfigError(reason, about="analytic.rounds")
        if isinstance(frozen, OwnModel) != (folder is None):
            reason = "name --peft FOLDER, except for a model with its own training loop, which has none"
            raise ConfigError(reason, about="--peft")
        if isinstance(frozen, OwnModel):
            if not labels:
                raise ConfigError(f"model {frozen.folder} needs --labels FILE, one label a line", about="--labels")
            tensors, config = frozen.first(len(labels)), PeftConfig(OWN, 0, 0, ())
        else:
            tensors, config, labels = read_seed(cast(Path, folder), labels)
        manifest, blob = seed_version(tensors, config, labels, frozen.digest)
        state_dir.settings.task(manifest)  # its method may not train such an adapter
        state_dir.registry.publish(manifest, blob, state_dir.key)
    return manifest


def read_seed(folder: Path, labels: Sequence[str] | None) -> tuple[Tensors, PeftConfig, Sequence[str]]:
    source, listed = read_peft(folder), folder / LABELS
    if labels is None:
        heads = any(is_saved(input_name(name)) for name in source.tensors)
        labels = read_lines(listed, "label") if heads or listed.exists() else ()
    return to_peft_tensors(source.tensors, source.peft_config), source.peft_config, labels


def seed_version(
    tensors: Tensors, peft_config: PeftConfig, labels: Sequence[str], base_digest: str
) -> tuple[VersionManifest, bytes]:
    """Make the manifest and the file of the first version.

    ``tensors``: of an adapter of ``edgeadapt.methods.classifier.PhraseClassifier`` or of a language model, under peft's
    names; or all parameters of an ``OwnModel``. ``labels``: of the head's rows, in order; none for a language model.
    Raises ConfigError: devices cannot train such an adapter, or the labels are not those of the head; DataError: the
    tensors are not those of the configuration."""
    require_trainable(peft_config)
    if peft_config.peft_type != OWN:
        _require_fitting(tensors, peft_config, labels)
    blob = files.encode(tensors)
    manifest = VersionManifest(
        version=0,
        sha256=files.sha256(blob),
        size=len(blob),
        base_digest=base_digest,
        layout_digest=Layout.of(tensors).digest,
        parent=None,
        round=0,
        plan=None,
        rule=None,
        combination=None,
        survivors=(),
        metrics={},
        privacy=None,
        peft_config=peft_config,
        labels=tuple(labels),
    )
    return manifest, blob


def _require_fitting(tensors: Tensors, peft_config: PeftConfig, labels: Sequence[str]) -> None:
    inputs = AdapterInputs.of_tensors(*as_lora(peft_config, from_peft_tensors(tensors, peft_config, {})))
    heads = {slot.path: {spec.name: spec.shape for spec in slot.parameters} for slot in inputs.saved}
    if labels:
        _require_classifier(inputs, heads, labels)
    elif heads:
        reason = f"the adapter trains {', '.join(sorted(heads))} in full, and has no labels: name them, or train "
        reason += "nothing else on a language model"
        raise ConfigError(reason, about="labels")


def _require_classifier(
    inputs: AdapterInputs, heads: Mapping[str, Mapping[str, tuple[int, ...]]], labels: Sequence[str]
) -> None:
    """Check that devices can train the adapter, and its head has these labels. Raises ConfigError."""
    layers = [*(slot.path for slot in inputs.loras), *map(layer_of, inputs.vectors)]
    if (
        set(heads) != {HEAD}
        or set(heads[HEAD]) != PARAMETERS
        or not all(path.startswith(ENCODER) for path in layers)
        or inputs.virtual
    ):
        raise ConfigError(
            "devices train the layers of an encoder and a linear head over the mean of its tokens, and the adapter has "
            "others: make it with 'edgeadapt base start'",
            about=HEAD,
        )
    rows = heads[HEAD]["weight"][0]
    if len(set(labels)) != len(labels) or len(labels) != rows:
        reason = f"the adapter's head has {rows} labels, and {len(set(labels))} different ones are given"
        raise ConfigError(reason, about="labels")
