"""``edgeadapt simulate privacy``: what differential privacy costs, before a federation is run."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aggregation.errors import ConfigError
from edgeadapt.commandline import FILE, as_json
from edgeadapt.formats.settings import overridden

if TYPE_CHECKING:
    from coordinator.settings import FederationSettings

HEAD = "devices  survive  honest  multiplier  epsilon  if all survive  noise/clip norm  bits  bytes up"


@dataclass(frozen=True, slots=True)
class CohortPlan:
    """What a cohort of one size costs."""

    devices: int
    minimum_survivors: int
    honest: int  # survivors of ``minimum_survivors`` whose noise counts
    noise_multiplier: float  # standard deviation of their noise over the clip norm
    epsilon: float  # spent in all rounds, if no more devices survive
    epsilon_all: float  # spent in all rounds, if every device survives
    noise: float  # norm of the noise in the mean of all devices over the clip norm, which no mean exceeds
    ring_bits: int  # bits of an element
    bytes_up: int  # bytes of an update of one device
    groups: int  # sums of a round
    smallest_sum: int  # fewest devices in one of them
    price: float  # ``noise`` over that of a round with one sum


@click.command()
@click.option("--numbers", type=click.IntRange(1, 2**27), required=True, help="Numbers in an update.")
@click.option(
    "--devices",
    type=click.IntRange(3, 10_000),
    multiple=True,
    default=(10, 100, 1000),
    show_default=True,
    help="Devices of a cohort; may be repeated.",
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
        plans = [{name: None if value == math.inf else value for name, value in asdict(row).items()} for row in rows]
        click.echo(json.dumps({"rounds": wanted.rounds, "delta": wanted.privacy.delta, "plans": plans}))
        return
    click.echo(f"{wanted.rounds} rounds of {wanted.privacy.mechanism} noise, delta {wanted.privacy.delta:g}")
    click.echo(HEAD)
    for row in rows:
        click.echo(
            f"{row.devices:>7}  {row.minimum_survivors:>7}  {row.honest:>6}  {row.noise_multiplier:>10.3f}  "
            f"{row.epsilon:>7.3f}  {row.epsilon_all:>14.3f}  {row.noise:>15.3f}  {row.ring_bits:>4}  {row.bytes_up:>8,}"
        )
    for row in (row for row in rows if row.groups > 1):
        click.echo(
            f"{row.devices:>7} devices in {row.groups} sums: one hides in a sum of {row.smallest_sum} or more, and the "
            f"noise of the mean is {row.price:.2f} × that of one sum"
        )


def _row(settings: "FederationSettings", numbers: int, devices: int) -> CohortPlan:
    from aggregation.ring import packed_size
    from edgeadapt.formats.layout import Layout, TensorSpec

    layout, bounds = Layout((TensorSpec("update", (numbers,)),)), settings.aggregation
    spec = settings.session_spec(devices, layout, "0" * 64, 1)
    ungrouped = settings.model_copy(update={"aggregation": bounds.model_copy(update={"groups": 1})})
    (of_one_sum,) = ungrouped.session_spec(devices, layout, "0" * 64, 1).vector.segments
    (segment,), delta = spec.vector.segments, settings.privacy.delta
    sizes = spec.minimum_survivors, devices
    fewest, most = (spec.spent(count).times(settings.rounds).epsilon(delta) for count in sizes)
    return CohortPlan(
        devices=devices,
        minimum_survivors=spec.minimum_survivors,
        honest=spec.honest(spec.minimum_survivors),
        noise_multiplier=spec.noise_multiplier(),
        epsilon=fewest,
        epsilon_all=most,
        noise=segment.noise * math.sqrt(numbers / devices) / spec.clip_norm,
        ring_bits=spec.vector.ring_bits,
        bytes_up=packed_size(numbers, spec.vector.ring_bits),
        groups=spec.groups,
        smallest_sum=spec.smallest_sum,
        price=segment.noise / of_one_sum.noise,
    )
