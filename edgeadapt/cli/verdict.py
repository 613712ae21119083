"""``edgeadapt adapters verdict`` and ``watch``: whether the release of a rollout is worse, and what follows."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from aggregation.errors import EdgeAdaptError
from edgeadapt import traces
from edgeadapt.commandline import FiniteRange
from edgeadapt.promotion.evaluations import act, judge
from edgeadapt.promotion.gates import GATES, GateError, GateSettings
from edgeadapt.releases.actions import login_name
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.lineage import Lineage
from edgeadapt.releases.repository import ChannelRepository

FOLDER = click.Path(path_type=Path)

releases = click.option("--releases", type=FOLDER, required=True, metavar="REPO", help="The repository of channels.")
trusted = click.option(
    "--trust", type=FOLDER, metavar="FILE", help="The coordinator's public key, PEM. Default: the one of DIR."
)
adapter_name = click.option("--adapter", default="global", show_default=True, metavar="NAME", help="Of both releases.")


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@click.argument("channel", metavar="CHANNEL")
@releases
@trusted
@adapter_name
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verdict(state_dir: Path, channel: str, releases: Path, trust: Path | None, adapter: str, as_json: bool) -> None:
    """Say whether the release that CHANNEL rolls out is worse than the one before, by the last evaluation of DIR.

    The evaluation is a round that 'edgeadapt coordinator evaluate' adds. The release is worse if its accuracy is below
    by more than accuracy.margin of REPO/gates.toml with 95 % confidence; then the exit code is 6, and
    'edgeadapt adapters rollback' takes the release back. An evaluation for which a release was taken back already gives
    no verdict on another one.

    \b
    Example:
      edgeadapt adapters verdict fleet stable --releases releases
    """
    newest, previous = _open(releases).compared(channel, adapter)
    margin = GateSettings.read(releases / GATES).accuracy.margin
    lineage, records = Lineage.read(state_dir, trust, None), audit_repository(releases, None).records
    evaluation = judge(lineage, channel, adapter, newest, previous, margin, records)
    if as_json:
        row = {"round": evaluation.round, "metrics": evaluation.metrics, "worse": evaluation.worse}
        click.echo(json.dumps(row | asdict(evaluation.verdict)))
    else:
        click.echo(str(evaluation))
    if evaluation.worse:
        reason = f"the newest release of {channel} is worse than the one before: take it back with "
        raise GateError(f"{reason}'edgeadapt adapters rollback'", about="evaluation", value=evaluation.round)


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@click.argument("channel", metavar="CHANNEL")
@releases
@trusted
@adapter_name
@click.option("--once", is_flag=True, help="Look once, and end.")
@click.option(
    "--interval",
    type=FiniteRange(min=0.1, max=86_400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def watch(
    state_dir: Path,
    channel: str,
    releases: Path,
    trust: Path | None,
    adapter: str,
    once: bool,
    interval: float,
    as_json: bool,
) -> None:
    """Roll CHANNEL back when the last evaluation of DIR finds the release that it rolls out worse than the one before.

    The rollback was signed when the rollout began, by 'edgeadapt adapters promote --key', so this machine needs no key
    but that of snapshot and timestamp in REPO/keys. Each verdict is signed into the log, from which
    'edgeadapt audit verify' computes it again. Without --once it goes on, and prints a line when something changes.

    \b
    Examples:
      edgeadapt adapters watch fleet stable --releases releases
      edgeadapt adapters watch fleet stable --releases releases --once --json
    """
    with traces.exporting(traces.GOVERNANCE):
        last = ""
        while True:
            try:
                with traces.span("watch", channel=channel) as span:
                    step = act(_open(releases), state_dir, trust, channel, adapter)
                    span.set(outcome=step.outcome)
                row = {
                    "outcome": step.outcome,
                    "text": step.text,
                    "release": step.release and step.release.number,
                    "evaluation": step.evaluation and asdict(step.evaluation),
                }
                line, failed = json.dumps(row) if as_json else step.text, False
            except (EdgeAdaptError, OSError) as error:
                if once or not last:  # it was called wrongly
                    raise
                line, failed = json.dumps({"error": str(error)}) if as_json else f"edgeadapt: {error}", True
            if line != last:
                click.echo(line, err=failed)
            if once:
                return
            last = line
            time.sleep(interval)


def _open(folder: Path) -> ChannelRepository:
    return ChannelRepository.open(folder, datetime.now(UTC), by=login_name())
