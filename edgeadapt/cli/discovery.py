"""``edgeadapt coordinator discover`` and ``groups``: a round that finds groups of devices, and what it found."""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from aggregation.errors import ConfigError
from client.inference.session import ClassificationSession
from coordinator.settings import SETTINGS
from coordinator.statedir import HEADER, CoordinatorStateDir
from edgeadapt import commandline
from edgeadapt.commandline import FILE, FOLDER, as_json, print_result
from edgeadapt.formats import storage
from edgeadapt.formats.layout import Floats, Layout
from edgeadapt.methods.peft.folder import to_peft
from edgeadapt.rounds.analytic import ClassifierHead
from edgeadapt.rounds.discovery import ASKED, MOST_CELLS, Cells, found

AT_ONCE = 64  # texts
LABELS = "labels.txt"

directory = click.argument("state_dir", type=FOLDER, metavar="DIR")
adapter = commandline.adapter("name", "The bundle's adapter with which devices train.", default="global")


def embedded(bundle: Path, name: str, texts: Sequence[str]) -> Floats:
    session = ClassificationSession.open(bundle)
    with commandline.status("embed texts") as report:
        rows = []
        for first in range(0, len(texts), AT_ONCE):
            rows.append(session.embed(texts[first : first + AT_ONCE], name))
            report(f"{min(first + AT_ONCE, len(texts))} of {len(texts)}")
    return np.concatenate(rows)


@click.command()
@directory
@click.option("--texts", type=FILE, required=True, metavar="FILE", help="Public texts of all kinds, one in a line.")
@commandline.bundle("A bundle with the federation's base and its newest adapter.")
@adapter
@click.option("--cells", type=click.IntRange(2, MOST_CELLS), default=24, show_default=True, help="Several for a group.")
@commandline.quiet
@as_json
def discover(state_dir: Path, texts: Path, bundle: Path, name: str, cells: int, as_json: bool) -> None:
    """Add a round that finds groups of devices to the federation of DIR, after those that are still to do.

    In it devices train nothing: each whose owner allows it (policy.observations) and that has 8 texts or more adds
    where the mean of its texts is to one sum, with the noise of discovery.noise_multiplier: epsilon 2 at delta 1e-5 for
    a few hundred devices. No device says which group it is in. FILE has texts of all kinds that devices may have.
    'edgeadapt coordinator groups' shows what was found.

    \b
    Example:
      edgeadapt coordinator discover fleet --texts public.txt --bundle bundle
    """
    made = Cells.of(embedded(bundle, name, storage.read_lines(texts, "a text")), cells)
    opened = CoordinatorStateDir.open(state_dir)
    head = ClassifierHead.of(Layout.of(opened.registry.newest_adapter().tensors))
    if head.hidden != len(made.mean):
        text = f"embeddings of {bundle} have {len(made.mean)} numbers, and those of the federation {head.hidden}"
        raise ConfigError(f"{text}: give a bundle with its base", about="--bundle")
    asked = {"cells": made.encode(), "count": cells}
    with opened.locked():
        settings = opened.settings.with_counting("discovery", len(opened.registry.rounds()), asked)
        storage.replace(state_dir / SETTINGS, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    line = f"round {settings.rounds} finds groups by {cells} cells: run it with 'edgeadapt coordinator run'"
    print_result({"round": settings.rounds, "cells": cells}, line, as_json)


@click.command()
@directory
@click.option("--most", type=click.IntRange(1, MOST_CELLS), default=6, show_default=True, help="So many at most.")
@click.option(
    "--smallest", type=click.IntRange(1), default=20, show_default=True, help="Devices; smaller groups join another."
)
@click.option("--texts", type=FILE, metavar="FILE", help="Name for each group the public texts nearest to it.")
@commandline.bundle("With --texts: the bundle with which the round was added.", new=True)
@adapter
@click.option("--out", type=FOLDER, metavar="FOLDER", help="Write an adapter that tells the groups apart.")
@commandline.quiet
@as_json
def groups(
    state_dir: Path, most: int, smallest: int, texts: Path | None, bundle: Path, name: str, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show the groups that the last round of discovery in DIR found, the largest first.

    With --out, an adapter whose labels are the groups is written, in the form of PEFT: 'edgeadapt bundle add --adapter
    router' adds it to a bundle. There 'device infer --adapter router' tells an owner the group of a text, and
    '--adapter auto' answers by the adapter named like it.

    \b
    Examples:
      edgeadapt coordinator groups fleet --most 6
      edgeadapt coordinator groups fleet --texts public.txt --bundle bundle --out router
    """
    opened = CoordinatorStateDir.open(state_dir)
    last = next((one.manifest for one in reversed(opened.registry.versions()) if ASKED in one.manifest.metrics), None)
    if last is None:
        text = "no round of discovery was run: add one with 'edgeadapt coordinator discover'"
        raise ConfigError(text, about="discovery")
    asked = opened.settings.discovery
    cells = Cells.decode(asked.cells, asked.count) if asked.cells else None
    if cells is None or cells.digest != last.metrics[ASKED]:
        text = f"the cells in {SETTINGS} are not those of round {last.round}: run the round that was added since"
        raise ConfigError(text, about="discovery.cells")
    seen = found(last.metrics, most, smallest)
    rows = [{"group": f"group-{number}", "devices": round(one.devices)} for number, one in enumerate(seen, 1)]
    if texts:
        lines = storage.read_lines(texts, "a text")
        near = cells.placed(cells.centered(embedded(bundle, name, lines))) @ np.stack([one.center for one in seen]).T
        for row, column in zip(rows, near.T, strict=True):
            row["near"] = [lines[place] for place in np.argsort(-column)[:3]]
    if out:
        newest = opened.registry.newest_adapter()
        head = ClassifierHead.of(newest.layout)
        weight, bias = cells.router([one.center for one in seen])
        to_peft(newest.tensors | {head.weight: weight, head.bias: bias}, newest.manifest.peft_config, out)
        storage.replace(out / LABELS, "".join(f"{row['group']}\n" for row in rows).encode(), storage.PUBLIC)
    about = [f"{row['group']}: about {row['devices']} devices{_near(row)}" for row in rows]
    print_result({"round": last.round, "groups": rows}, "\n".join(about), as_json)


def _near(row: dict[str, object]) -> str:
    return f", near {row['near']}" if "near" in row else ""
