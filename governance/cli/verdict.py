"""``edgeadapt adapters verdict``: whether the newest release of a rollout is worse than the one before."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from aggregation.errors import ConfigError, DataError
from coordinator.channels.comparison import compared
from coordinator.channels.repository import ChannelRepository
from coordinator.channels.verdict import verdict as verdict_of
from governance.evaluations import last_evaluation
from governance.gates import GateError
from governance.gatesettings import GATES, GateSettings
from governance.lineage import Lineage

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@click.argument("channel", metavar="CHANNEL")
@click.option("--releases", type=FOLDER, required=True, metavar="REPO", help="The repository of channels.")
@click.option(
    "--trust", type=FOLDER, metavar="FILE", help="The coordinator's public key, PEM. Default: the one of DIR."
)
@click.option("--adapter", default="global", show_default=True, metavar="NAME", help="Of both releases.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verdict(state_dir: Path, channel: str, releases: Path, trust: Path | None, adapter: str, as_json: bool) -> None:
    """Say whether the release that CHANNEL rolls out is worse than the one before, by the last evaluation of DIR.

    The evaluation is a round that 'edgeadapt coordinator evaluate' adds. The release is worse if its accuracy is below
    by more than accuracy.margin of REPO/gates.toml with 95 % confidence; then the exit code is 6, and
    'edgeadapt adapters rollback' takes the release back.

    \b
    Example:
      edgeadapt adapters verdict fleet stable --releases releases
    """
    repository = ChannelRepository.open(releases, datetime.now(UTC))
    newest, previous = compared(repository, channel, adapter)
    margin = GateSettings.read(releases / GATES).accuracy.margin
    found = last_evaluation(Lineage.read(state_dir, trust, None), newest, previous)
    if found is None or found.record is None:
        add = f"add one with 'edgeadapt coordinator evaluate {state_dir}', and run it"
        raise ConfigError(f"no round has compared the two releases of {channel}: {add}", about="evaluation")
    judged = verdict_of(found.manifest.metrics, margin)
    if judged is None:
        reason = f"round {found.record.round} counted too few examples of one of the releases: raise the share, or wait"
        raise DataError(reason, about="evaluation", value=found.record.round)
    if as_json:
        row = {"round": found.record.round, "metrics": found.manifest.metrics, "worse": judged.worse}
        click.echo(json.dumps(row | asdict(judged)))
    else:
        click.echo(f"round {found.record.round}, {len(found.manifest.survivors)} survivors: {judged}")
    if judged.worse:
        reason = f"the newest release of {channel} is worse than the one before: take it back with "
        raise GateError(f"{reason}'edgeadapt adapters rollback'", about="evaluation", value=found.record.round)
