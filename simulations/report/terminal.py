"""What a run prints in a terminal, in eighty columns: what it is about to do, and the closing table."""

import math
import shlex
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordinator.settings import FederationSettings
from edgeadapt.bases.base import MODELS
from simulations.data.summary import DataSummary, lines
from simulations.report import formatting
from simulations.report.formatting import count, duration, percent, printable, share, size
from simulations.result import ARMS, TITLES, ExportResult, RunResult
from simulations.scenario import Scenario

NOTES = {
    "base": "the vendor's head, no training",
    "local": "each client by itself",
    "global": "the last global adapter",
    "personal": "global, then the personal step",
}
LABEL = 11  # columns
WORST = 3  # confusions that are named
SHORT = ("clients", "texts", "look at", "broken")  # lines about the data; 'simulate look' has all


def print_scenario(
    scenario: Scenario, log: Path, console: Console, *, data: DataSummary, devices: int, note: str = ""
) -> None:
    """Print what a run is about, before it starts. ``devices`` take part in training, in the smallest federation.
    ``note``: about the engine, unless empty."""
    about = [*_plan(scenario, devices), *([("engine", note)] if note else [])]
    about += [line for line in lines(data) if line[0] in SHORT or (line[0] == "unknown" and data.warns)]
    console.print(Text(f"Scenario {scenario.name}, seed {scenario.seed}", style="bold"))
    _print_lines([*about, ("log", f"tail -f {shlex.quote(str(log))}")], console)
    console.print()


def print_data(summary: DataSummary, console: Console) -> None:
    _print_lines(lines(summary), console)
    console.print()


def _print_lines(lines: Iterable[tuple[str, str | Text]], console: Console) -> None:
    for label, text in lines:
        line = Text.assemble((f"{label:<{LABEL}}", "dim"), printable(text) if isinstance(text, str) else text)
        console.print(line, soft_wrap=True, highlight=False)


def _plan(scenario: Scenario, devices: int) -> list[tuple[str, str]]:
    federation, model = scenario.federation, scenario.base.model
    training, fitted = federation.training, federation.analytic.rounds
    each = f"each with {count(training.epochs, 'epoch')} at learning rate {training.learning_rate:g}"
    rounds = [f"{federation.training_rounds} that train, {each}"] if federation.training_rounds else []
    rounds += [f"{fitted} that {'fit' if fitted > 1 else 'fits'} the head"] if fitted else []
    kind = "language model" if scenario.data.for_language_model else "encoder"
    what = f"a pretrained {kind}, frozen on every device"
    if model in MODELS.names():
        what = "with its own training loop: all of its parameters are trained"
    attack = f"{100 * scenario.attack.share:g} % of the devices lie in their updates: {scenario.attack.kind}"
    return [
        ("base", f"{model}, {what}"),
        ("rounds", f"{', then '.join(rounds)}; {federation.aggregation.adversary} secure aggregation"),
        *([("sums", _price(federation, devices))] if federation.aggregation.groups > 1 else []),
        ("privacy", _noise(federation)),
        *([("ATTACK", attack)] if scenario.attack.kind != "none" else []),
    ]


def _price(federation: FederationSettings, devices: int) -> str:
    bounds = federation.aggregation
    devices = min(federation.cohort.size or devices, devices)
    dealt = bounds.grouping(devices)
    if dealt is None:
        return "none"
    hides = f"{devices // dealt.count} instead of {devices}, never of fewer than {dealt.minimum}"
    if federation.privacy.noisy:
        hides += f", and the mean has about {dealt.count**0.5:.1f} × the noise of one sum"
    combined = f"{dealt.count} sums a round, combined by {bounds.combine}"
    return f"{combined}: of {devices} devices, one hides in a sum of {hides}"


def _noise(federation: FederationSettings) -> str:
    privacy = federation.privacy
    if not privacy.noisy:
        return "none: nothing bounds what the sums say about one device"
    amount = f"epsilon {privacy.epsilon:g}" if privacy.epsilon else f"noise multiplier {privacy.noise_multiplier:g}"
    norm = federation.aggregation.clip_norm if federation.training_rounds else federation.analytic.clip_norm
    return f"{privacy.mechanism} noise, {amount}, delta {privacy.delta:g}, clip norm {norm:g}"


def print_result(result: RunResult, console: Console, program: str = "edgeadapt") -> None:
    if result.exported is None:
        if said := formatting.incomplete(result.round_tally):
            console.print(Text(said.strip(), style="bold"))
        console.print(_clients(result))
        _print_lines(_facts(result), console)
        return
    console.print()
    console.print(Text(formatting.headline(result), style="bold"))
    console.print(Text(formatting.context(result, program), style="dim"))
    console.print()
    console.print(_accuracy(result))
    console.print()
    _print_lines([*_facts(result), *_exported(result, result.exported, program)], console)


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    return table


def _accuracy(result: RunResult) -> Table:
    table = _table(result.metric, TITLES.values())
    for arm in ARMS:
        cells = [share(result.summary(arm)[column]) for column in TITLES]
        table.add_row(arm, *cells, Text(NOTES[arm], style="dim"), style="bold" if arm == "personal" else "")
    return table


def _clients(result: RunResult) -> Table:
    table = _table(result.metric, ARMS)
    for client in result.clients:
        cells = [f"{client.arms[arm]:.3f}" for arm in ARMS]
        table.add_row(Text(printable(client.name)), *cells, Text("unseen" if client.unseen else client.choice, "dim"))
    table.add_section()
    for name in ("mean", "worst", "unseen"):
        values = [result.summary(arm)[name] for arm in ARMS]
        table.add_row(Text(name, "bold"), *("–" if math.isnan(value) else f"{value:.3f}" for value in values), "")
    return table


def _facts(result: RunResult) -> list[tuple[str, str | Text]]:
    amount, meaning = formatting.privacy(result)
    private: list[tuple[str, str | Text]] = [("privacy", Text.assemble((amount, "bold"), f": {meaning}"))]
    if result.canaries:
        private += zip(("canaries", ""), formatting.canaries(result.canaries), strict=True)
    resumed = [("resumed", said)] if (said := formatting.interrupted(result.round_tally)) else []
    if result.exported is None:
        version = f"version {result.adapter['version']} after {count(len(result.rounds), 'round')}"
        note = formatting.evaluated(len(result.clients), result.population)
        return [
            ("adapter", f"{version}, {size(int(result.adapter['bytes']))}"),
            *([("dropouts", formatting.dropouts(result.rounds))] if result.round_tally.aborted else []),
            *resumed,
            *private,
            *([] if result.masked else [("engine", formatting.UNMASKED)]),
            ("time", duration(result.seconds["total"])),
            *([("evaluated", note)] if note else []),
        ]
    traffic = formatting.TrafficMeans.of(result)
    return [
        *([("groups", formatting.formatted_groups(result))] if result.groups else []),
        ("up", _traffic(traffic.up, traffic.model)),
        ("down", _traffic(traffic.down, traffic.model)),
        ("dropouts", formatting.dropouts(result.rounds)),
        *resumed,
        *private,
        ("time", _time(result.seconds)),
    ]


def _confused(exported: ExportResult) -> str:
    rows = formatting.confusions(exported.answered)[:WORST]
    return "; ".join(
        f"{printable(label)} taken for {printable(answer)} {wrong} of {every}" for wrong, every, label, answer in rows
    )


def _exported(result: RunResult, exported: ExportResult, program: str) -> list[tuple[str, str | Text]]:
    says, errors = formatting.reliability(exported.reliability)
    return [
        ("parity", _parity(exported.parity)),
        ("exported", formatting.accuracies(exported.parity)),
        ("confidence", f"when it says 90 %, {says}"),
        ("", errors),
        *([("words", formatting.word_f1(exported.answered))] if exported.by_word else []),
        *([("confused", _confused(exported))] if formatting.confusions(exported.answered) else []),
        *([("examples", Text(exported.confused))] if exported.confused else []),
        *([("phrases", formatting.plain(exported.plain))] if exported.plain else []),
        ("bundle", Text(exported.bundle)),
        ("report", Text(exported.report)),
        *(
            ("" if place else "try", Text(f"{words}:\n{'':{LABEL}}{typed}"))
            for place, (words, typed) in enumerate(formatting.next_commands(result, exported, program))
        ),
    ]


def _traffic(value: float, model: float) -> str:
    if not math.isfinite(value):
        return "nothing: every round was aborted"
    return f"{size(value)} a device a round, {percent(value, model)} of the full model ({size(model)})"


def _time(seconds: dict[str, float]) -> str:
    training, coordination = seconds["training"], seconds["coordination"]
    if not training > 0:  # in other processes, which count no time
        return f"{duration(seconds['total'])}; rounds with training {duration(coordination)}"
    return (
        f"{duration(seconds['total'])}; training {duration(training)}; "
        f"coordination {duration(coordination)}, {percent(coordination, training)} of that"
    )


def _parity(parity: dict[str, float | int]) -> str:
    return (
        f"{share(parity['agreement'], 4)} of {count(int(parity['count']), 'phrase')} as in torch, "
        f"largest difference {parity['max_abs_diff']:.2g}"
    )
