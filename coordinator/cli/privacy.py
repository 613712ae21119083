"""``edgeadapt simulate privacy``: what differential privacy costs, before a federation is run."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.errors import ConfigError
from edgeadapt.commandline import FILE, as_json, option
from edgeadapt.formats.settings import overridden

if TYPE_CHECKING:
    from coordinator.settings import FederationSettings

LINE = (
    "{devices:>7}  {minimum_survivors:>7}  {honest:>6}  {noise_multiplier:>10.3f}  {epsilon:>7.3f}  "
    "{epsilon_all:>14.3f}  {noise:>15.3f}  {ring_bits:>4}  {bytes_up:>8,}"
)
IN_GROUPS = (
    "{devices:>7} devices in {groups} sums: one hides in a sum of {smallest_sum} or more, and the noise of the mean is "
    "{price:.2f} × that of one sum"
)
HEAD = "devices  survive  honest  multiplier  epsilon  if all survive  noise/clip norm  bits  bytes up"


@click.command()
@click.option("--numbers", type=click.IntRange(1, 2**27), required=True, help="Numbers in an update.")
@option(
    "--devices",
    "Devices of a cohort; may be repeated.",
    type=click.IntRange(3, 10_000),
    multiple=True,
    default=(10, 100, 1000),
    show_default=True,
)
@click.option("--settings", type=FILE, metavar="FILE", help="A federation.toml; the defaults without it.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of the settings; may be repeated.")
@as_json
def privacy(
    numbers: int, devices: tuple[int, ...], settings: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Print, for each size of a cohort, the noise and the epsilon of all rounds, and how large the noise is.

    The accuracy that noise costs depends on the task, and a scenario measures it. Compare the noise of the mean with
    the updates: a mean has at most the clip norm, and one of unlike updates much less.

    \b
    Examples:
      edgeadapt simulate privacy --numbers 50000 --set privacy.mechanism=skellam --set privacy.epsilon=8 --set rounds=5
      edgeadapt simulate privacy --numbers 50000 --settings fleet/federation.toml --devices 40 --devices 400
    """
    from coordinator.settings import FederationSettings

    federation = FederationSettings.read(settings, overrides) if settings else None
    wanted = federation or FederationSettings.parse(overridden({}, overrides), "--set")
    if not wanted.privacy.noisy:
        text = "the sums would have no noise: name privacy.mechanism and privacy.epsilon or privacy.noise_multiplier"
        raise ConfigError(text, about="privacy.mechanism")
    rows = [_row(wanted, numbers, count) for count in devices]
    if as_json:
        plans = [{name: None if value == math.inf else value for name, value in row.items()} for row in rows]
        click.echo(json.dumps({"rounds": wanted.rounds, "delta": wanted.privacy.delta, "plans": plans}))
        return
    click.echo(f"{wanted.rounds} rounds of {wanted.privacy.mechanism} noise, delta {wanted.privacy.delta:g}")
    click.echo(HEAD)
    for row in rows:
        click.echo(LINE.format(**row))
    for row in (row for row in rows if row["groups"] > 1):
        click.echo(IN_GROUPS.format(**row))


def _row(settings: "FederationSettings", numbers: int, devices: int) -> dict[str, Any]:
    from aggregation.ring import packed_size
    from edgeadapt.formats.layout import Layout, TensorSpec

    layout, bounds = Layout((TensorSpec("update", (numbers,)),)), settings.aggregation
    spec = settings.session_spec(devices, layout, "0" * 64, 1)
    ungrouped = settings.model_copy(update={"aggregation": bounds.model_copy(update={"groups": 1})})
    (of_one_sum,) = ungrouped.session_spec(devices, layout, "0" * 64, 1).vector.segments
    (segment,), delta = spec.vector.segments, settings.privacy.delta
    sizes = spec.minimum_survivors, devices
    fewest, most = (spec.spent(count).times(settings.rounds).epsilon(delta) for count in sizes)
    return {
        "devices": devices,
        "minimum_survivors": spec.minimum_survivors,
        "honest": spec.honest(spec.minimum_survivors),  # whose noise counts
        "noise_multiplier": spec.noise_multiplier(),  # standard deviation of their noise over the clip norm
        "epsilon": fewest,  # spent in all rounds, if no more devices survive
        "epsilon_all": most,  # spent in all rounds, if every device survives
        # Norm of the noise in the mean of all devices over the clip norm, which no mean exceeds.
        "noise": segment.noise * math.sqrt(numbers / devices) / spec.clip_norm,
        "ring_bits": spec.vector.ring_bits,
        "bytes_up": packed_size(numbers, spec.vector.ring_bits),  # of an update of one device
        "groups": spec.groups,
        "smallest_sum": spec.smallest_sum,
        "price": segment.noise / of_one_sum.noise,
    }
