"""``edgeadapt release versions``: where versions are from, where they are, what changed, and what they were made of.
Every manifest and the chain of round records are verified first; nothing is written but a bill of materials."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError
from edgeadapt.commandline import FILE, FOLDER, as_json, path_option, print_result
from edgeadapt.formats import storage
from edgeadapt.formats.manifest import PrivacyBound, ServerRule
from edgeadapt.releases.lineage import (
    GovernedVersion,
    Lineage,
    ReleasedAdapter,
    TensorChange,
    VersionDifference,
    difference,
)
from edgeadapt.releases.repository import ChannelRepository

NUMBER = click.IntRange(0, 2**63 - 1)


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@click.argument("version", type=NUMBER, metavar="[VERSION]", required=False)
@click.argument("other", type=NUMBER, metavar="[OTHER]", required=False)
@path_option("--releases", "A repository of channels, to see what is there.", metavar="REPO")
@path_option("--trust", "The coordinator's public key, PEM. Default: the one of DIR.")
@click.option("--sbom", is_flag=True, help="Print VERSION's software bill of materials: always JSON, CycloneDX 1.6.")
@path_option("--out", "With --sbom: write it here. Default: standard output.", type=FILE)
@as_json
def versions(
    state_dir: Path,
    version: int | None,
    other: int | None,
    releases: Path | None,
    trust: Path | None,
    sbom: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """List the versions of DIR, oldest first: the round, its survivors, metrics, privacy, and the channels.

    Of one VERSION, show its parent, round, rule and survivors, who signed it, metrics, privacy and releases. With
    OTHER, compare that with VERSION: each tensor's norms and the angle between the two, layout, labels, metrics and
    privacy; a layer with LoRA also by its update B A, since 2A and B/2 are the same adapter.

    The bill of materials has the adapter, the versions that it was made from and its base, with digests; with
    --releases the exported files; and the packages of the bare install on this machine.

    \b
    Examples:
      edgeadapt release versions fleet
      edgeadapt release versions fleet 3
      edgeadapt release versions fleet 2 3
      edgeadapt release versions fleet 3 --sbom --releases releases --out adapter-3.cdx.json
      edgeadapt release versions runs/demo/coordinator --releases releases --json
    """
    if (sbom and (version is None or other is not None)) or (out and not sbom):
        raise ConfigError("--sbom is of one VERSION, and --out of --sbom", about="--sbom")
    repository = None if releases is None else ChannelRepository.open(releases, datetime.now(UTC))
    lineage = Lineage.read(state_dir, trust, repository)
    if version is None:
        _list(lineage, as_json)
        return
    governed = lineage.version(version)
    if sbom:
        _materials(lineage, version, out, as_json)
    elif other is None:
        click.echo(json.dumps(_row(governed)) if as_json else "\n".join(_lines(governed)))
    else:
        old, new = governed.manifest, lineage.version(other).manifest
        changes = difference(old, new, lineage.registry.tensors(old), lineage.registry.tensors(new))
        click.echo(json.dumps(asdict(changes)) if as_json else "\n".join(_changes(changes)))


def _materials(lineage: Lineage, version: int, out: Path | None, as_json: bool) -> None:
    from edgeadapt.releases.sbom import bill_of_materials

    text = bill_of_materials(lineage.versions[: version + 1], datetime.now(UTC))
    if out is None:
        click.echo(text)
    else:
        storage.replace(out, text.encode(), storage.PUBLIC)
        print_result({"file": str(out)}, f"{out}: CycloneDX 1.6", as_json)


def _list(lineage: Lineage, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"versions": [_row(each) for each in lineage.versions]}))
        return
    click.echo("version  round  survivors  accuracy    loss  privacy                     channels")
    for each in lineage.versions:
        accuracy, loss = (each.manifest.metrics.get(name) for name in ("accuracy", "loss"))
        cells = (
            f"{each.manifest.version:>7}",
            f"{each.manifest.round or '-':>5}",
            f"{len(each.manifest.survivors) or '-':>9}",
            f"{'-' if accuracy is None else format(accuracy, '.3f'):>8}",
            f"{'-' if loss is None else format(loss, '.3f'):>6}",
            f"{_privacy(each.manifest.privacy):<26}",
            ", ".join(f"{place.channel} {place.release}" for place in each.releases or () if place.current),
        )
        click.echo("  ".join(cells).rstrip())


def _row(version: GovernedVersion) -> dict[str, Any]:
    record, manifest = version.record, asdict(version.manifest)
    return {
        **manifest,
        "signed_by": version.signed_by,
        "dropped": {} if record is None else record.dropped,
        "spoiled": record and record.spoiled,
        "releases": None if version.releases is None else [_place(each) for each in version.releases],
    }


def _place(released: ReleasedAdapter) -> dict[str, Any]:
    adapter = released.adapter
    return {
        "channel": released.channel,
        "release": released.release,
        "made": released.made,
        "current": released.current,
        "adapter": adapter.name,
        "version": adapter.version,
        "format": adapter.format,
        "sha256": adapter.sha256,
        "card": adapter.card and dict(adapter.card),
    }


def _lines(version: GovernedVersion) -> Iterator[str]:
    manifest, record = version.manifest, version.record
    config = manifest.peft_config
    yield f"version      {manifest.version}, sha256 {manifest.sha256}, {manifest.size:,} bytes"
    yield f"signed by    {version.signed_by}"
    yield f"parent       {manifest.parent or 'none: it is the first'}"
    yield f"base         {manifest.base_digest}"
    yield f"method       {config.peft_type}, rank {config.r}, {len(manifest.labels)} labels"
    if record is not None:
        dropped = f"{len(record.dropped)} dropped out"
        yield f"round        {record.round}, plan {record.plan}"
        yield f"survivors    {len(manifest.survivors)}, {dropped}: {', '.join(manifest.survivors)}"
        yield f"rule         {_rule(manifest.rule)}"
        if manifest.combination is not None:
            yield f"combination  {_rule(manifest.combination)}"
        if record.spoiled:
            yield f"spoiled      {record.spoiled}"
    yield f"metrics      {', '.join(f'{name} {value:.4g}' for name, value in manifest.metrics.items()) or 'none'}"
    yield f"privacy      {_privacy(manifest.privacy)}"
    for released in version.releases or ():
        state = "current" if released.current else "replaced"
        what = f"as {released.adapter.name} {released.adapter.version}, {released.adapter.format}"
        yield f"release      {released.channel} {released.release} of {released.made}, {what}, {state}"
        if released.adapter.card:
            yield f"             {released.adapter.card}"
    if version.releases == ():
        yield "release      none"


def _changes(changes: VersionDifference) -> Iterator[str]:
    if not changes.same_base:
        yield "the two versions are for different bases"
    if not changes.peft_config:
        yield "the settings of the method differ"
    for name, change in (("added", changes.added), ("removed", changes.removed)):
        if change:
            yield f"tensors {name}: {', '.join(change)}"
    for name, labels in (("added", changes.labels_added), ("removed", changes.labels_removed)):
        if labels:
            yield f"labels {name}: {', '.join(labels)}"
    if changes.labels_moved:
        yield "the labels are in another order"
    width = max((len(each.name) for each in (*changes.tensors, *changes.updates)), default=4)
    for title, rows in (("tensor", changes.tensors), ("update B A of a layer", changes.updates)):
        if rows:
            yield f"{title:<{width}}    before     after    change  cosine"
            yield from (_change(each, width) for each in rows)
    if changes.total is not None:
        yield _change(changes.total, width)
    for name, (before, after) in changes.metrics.items():
        yield f"{name}: {_number(before)} to {_number(after)}"
    yield f"privacy: {_privacy(changes.privacy[0])} to {_privacy(changes.privacy[1])}"


def _change(row: TensorChange, width: int) -> str:
    cosine = "-" if row.cosine is None else format(row.cosine, ".3f")
    return f"{row.name:<{width}}  {row.before:>8.4g}  {row.after:>8.4g}  {row.change:>8.4g}  {cosine:>6}"


def _rule(rule: ServerRule | None) -> str:
    numbers = "" if rule is None else ", ".join(f"{name} {value:g}" for name, value in rule.numbers.items())
    return "none" if rule is None else rule.name + (f" ({numbers})" if numbers else "")


def _privacy(bound: PrivacyBound | None) -> str:
    return "no bound" if bound is None else str(bound)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
