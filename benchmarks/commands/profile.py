"""The command `python -m benchmarks profile`."""

import json
from pathlib import Path

import click

from client.cli import options


@click.command()
@options.bundle
@options.trust
@click.option("--adapter", metavar="NAME", help="Use this adapter of the bundle.  [default: the bare base]")
@click.option("--tokens", type=click.IntRange(1, 4096), default=64, show_default=True, help="Tokens to write.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads of the graph.")
@options.as_json
def profile(bundle: Path, trust: Path | None, adapter: str | None, tokens: int, threads: int, as_json: bool) -> None:
    """Where the start, the memory and the tokens of a language model go.

    A process of its own opens the bundle as `edgeadapt device chat` does, and writes tokens with and without ONNX
    Runtime's profiler. Times are of one run: repeat it, and compare it with the CPU time on a busy machine.

    \b
    Examples:
      python -m benchmarks profile --bundle bundle
      python -m benchmarks profile --bundle bundle --adapter global --tokens 128 --json
    """
    from benchmarks.ondevice import profile as run

    found = run.profile(bundle, trust, adapter, tokens, threads)
    click.echo(json.dumps(found) if as_json else run.table(found))
