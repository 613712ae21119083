"""``edgeadapt audit``: the commands of an auditor."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

from aggregation.errors import TrustError
from coordinator.audit import formatting
from coordinator.audit.auditor import Report
from coordinator.audit.transcripts import AuditedTranscript, Given, first_error

FOLDER = click.Path(path_type=Path)
Told = Callable[[AuditedTranscript, Mapping[str, Report]], Iterator[str]]


class _Moment(click.DateTime):
    """A time in UTC, or the end of a day: a certificate that is made on a day is not yet valid at its beginning."""

    def __init__(self) -> None:
        super().__init__(("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        at: datetime = super().convert(value, param, ctx).replace(tzinfo=UTC)
        return at if "T" in str(value) else at.replace(hour=23, minute=59, second=59)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--unfinished", is_flag=True, help="Accept a session that is still under way."),
        click.option(
            "--registry",
            type=FOLDER,
            metavar="DIR",
            help="The coordinator's home, to check the adapters too. Default: the one that the logs lie in.",
        ),
        click.option(
            "--at",
            type=_Moment(),
            metavar="DATE",
            help="When the sessions took place (UTC), to check the dates of certificates; a day without a time is its "
            "end. Default: not checked.",
        ),
        click.option(
            "--revoked",
            type=FOLDER,
            metavar="FILE",
            help="The authority's revocation list; with --at, what was revoked later counts. Default: not checked.",
        ),
        click.option(
            "--coordinator", type=FOLDER, metavar="FILE", help="Its public key, PEM. Default: beside the logs."
        ),
        click.option(
            "--authority", type=FOLDER, metavar="FILE", help="Its certificate, PEM. Default: beside the logs."
        ),
        click.argument("path", type=click.Path(exists=True, path_type=Path)),
    ):
        command = option(command)
    return command


@click.group("audit", context_settings={"help_option_names": ["-h", "--help"]})
def audit_command() -> None:
    """Check from its transcripts that a coordinator kept to the protocol."""


@audit_command.command()
@_options
def verify(path: Path, unfinished: bool, as_json: bool, **options: Any) -> None:
    """Check every session at PATH, and exit with 4 if one does not hold.

    PATH is a session's log, a coordinator's home, or the folder of a run.

    \b
    Examples:
      edgeadapt audit verify runs/demo
      edgeadapt audit verify runs/demo --authority pinned/authority.pem --coordinator pinned/coordinator.pem
      edgeadapt audit verify runs/demo --at 2026-11-25 --revoked runs/demo/revoked.crl
      edgeadapt audit verify transcript/session-000001.log --json
    """
    _audit(path, unfinished, as_json, options, formatting.told)


@audit_command.command(short_help="List the rounds at PATH, who was counted and who dropped out.")
@_options
@click.option("--entries", is_flag=True, help="List every message too.")
def show(path: Path, unfinished: bool, as_json: bool, entries: bool, **options: Any) -> None:
    """List the rounds at PATH: who was in the plan, who was counted, who dropped out, what came of it.

    \b
    Examples:
      edgeadapt audit show runs/demo
      edgeadapt audit show transcript/session-000001.log --entries
    """
    _audit(path, unfinished, as_json, options, partial(formatting.shown, entries=entries))


def _audit(path: Path, unfinished: bool, as_json: bool, options: dict[str, Any], told: Told) -> None:
    opened = AuditedTranscript.open(path, Given(**options))
    reports = opened.audit(unfinished=unfinished)
    error = first_error(opened, reports, unfinished=unfinished)
    if as_json:
        click.echo(json.dumps({**formatting.as_json(opened, reports), "ok": error is None, "error": error}))
    else:
        click.echo("\n".join(told(opened, reports)))
    if error is None:
        return
    if as_json:  # the one object on standard output has said it
        click.echo(f"edgeadapt: {error}", err=True)
        click.get_current_context().exit(TrustError.exit_code)
    raise TrustError(error)
