"""The coordinator's and the authority's commands. A command of the authority is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

# command → (module, attribute, one line for --help, extra that it needs)
AUTHORITY = {
    "crl": ("edgeadapt.cli.authority", "crl", "Sign a new revocation list before the last one expires.", ""),
    "init": ("edgeadapt.cli.authority", "init", "Create an authority.", ""),
    "invite": ("edgeadapt.cli.authority", "invite", "Print a token with which a device can enrol.", ""),
    "issue": ("edgeadapt.cli.authority", "issue", "Certify a device's key.", ""),
    "issue-tls": ("edgeadapt.cli.authority", "issue_tls", "Certify the TLS key of a gateway.", ""),
    "list": ("edgeadapt.cli.authority", "list_", "List every certificate that was issued, with its status.", ""),
    "revoke": ("edgeadapt.cli.authority", "revoke", "Revoke a device's certificates, or one by its serial.", ""),
    "serve": ("edgeadapt.cli.enrolment", "serve", "Enrol invited devices over a network, and renew.", "coordinator"),
}

__all__ = ["authority_group"]


@click.command("authority", cls=LazyGroup, table=AUTHORITY, context_settings={"help_option_names": ["-h", "--help"]})
def authority_group() -> None:
    """Enrol devices: certify their keys, revoke them, list them.

    Devices and coordinator pin authority.pem; the key stays in DIR. See docs/how-to/enrol-devices.md.
    """
