"""``edgeadapt coordinator evaluate``: let the next round compare the two releases of a rollout."""

import json
from pathlib import Path

import click

from coordinator.cli.options import as_json, directory
from edgeadapt.formats import storage

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(short_help="Let the next round compare the two releases of a rollout.")
@directory
@click.option("--releases", type=FOLDER, required=True, metavar="REPO", help="The repository of channels.")
@click.option("--channel", required=True, metavar="CHANNEL", help="The channel with the rollout.")
@click.option("--adapter", default="global", show_default=True, metavar="NAME", help="Of both releases.")
@as_json
def evaluate(state_dir: Path, releases: Path, channel: str, adapter: str, as_json: bool) -> None:
    """Add a round of evaluation to the federation of DIR, after those that are still to do.

    In it devices train nothing: each counts the right answers of the release that it has to its own held-out examples,
    and the round sums the counts of the newest release and of the one before, as it would sum updates. The settings in
    DIR/federation.toml are written anew. 'edgeadapt adapters verdict' and 'watch' read the result.

    The counts have the noise of evaluation.noise_multiplier, or that of the federation if it is more. What the accuracy
    of a release is off by depends on how many devices have it: an evaluation needs a few dozen of each.

    \b
    Example:
      edgeadapt coordinator evaluate fleet --releases releases --channel stable
    """
    from datetime import UTC, datetime

    from coordinator.settings import SETTINGS
    from coordinator.statedir import HEADER, CoordinatorStateDir
    from edgeadapt.releases.repository import ChannelRepository

    opened = CoordinatorStateDir.open(state_dir)
    repository = ChannelRepository.open(releases, datetime.now(UTC))
    newest, previous = repository.compared(channel, adapter)
    with opened.locked():
        settings = opened.settings.with_evaluation(len(opened.registry.rounds()), newest, previous)
        storage.replace(state_dir / SETTINGS, HEADER + settings.to_toml().encode(), storage.PUBLIC)
    row = {"round": settings.rounds, "newest": newest, "previous": previous}
    line = (
        f"round {settings.rounds} compares {newest[:16]} with {previous[:16]}: run it with 'edgeadapt coordinator run'"
    )
    click.echo(json.dumps(row) if as_json else line)
