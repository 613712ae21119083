"""Version 0 of the registry: the adapter that the first round starts from."""

from collections.abc import Mapping, Sequence

from aggregation.errors import ConfigError
from edgeadapt.formats import files
from edgeadapt.formats.graphinputs import layer_of
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.peftconfig import OWN, PeftConfig, require_trainable
from edgeadapt.methods.parts import HEAD
from edgeadapt.methods.peft.inputs import AdapterInputs
from edgeadapt.methods.peft.lowrank import as_lora
from edgeadapt.methods.peft.methods import from_peft_tensors

ENCODER = "encoder."  # begins the path of every layer below it
PARAMETERS = {"weight", "bias"}


def seed_version(
    tensors: Tensors, peft_config: PeftConfig, labels: Sequence[str], base_digest: str
) -> tuple[VersionManifest, bytes]:
    """Make the manifest and the file of the first version.

    Args:
        tensors: Of an adapter of ``edgeadapt.methods.classifier.PhraseClassifier``, or of a language model, under
            peft's names; or all parameters of an ``OwnModel``.
        labels: Of the head's rows, in order; none for a language model.

    Raises:
        ConfigError: Devices cannot train such an adapter, or the labels are not those of the head.
        DataError: The tensors are not those of the configuration.
    """
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
        raise ConfigError(
            f"the adapter trains {', '.join(sorted(heads))} in full, and has no labels: name them, or train "
            "nothing else on a language model",
            about="labels",
        )


def _require_classifier(
    inputs: AdapterInputs, heads: Mapping[str, Mapping[str, tuple[int, ...]]], labels: Sequence[str]
) -> None:
    """Check that devices can train the adapter, and its head has these labels. Raises ConfigError.

    ``heads``: path of a module that is trained in full → its parameters' shapes.
    """
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
            value=sorted(heads),
        )
    rows = heads[HEAD]["weight"][0]
    if len(set(labels)) != len(labels) or len(labels) != rows:
        raise ConfigError(
            f"the adapter's head has {rows} labels, and {len(set(labels))} different ones are given", about="labels"
        )
