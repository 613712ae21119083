"""What differential privacy costs an analytic head, and what canaries find: a table with a row for each epsilon.

Every device of a population contributes to one sum through the code of a real device, in the ring, with the noise that
the settings calibrate; the coordinator's code makes the head. The masks are left out, because they cancel: texts are
embedded once for all rows, and hundreds of devices take a minute. ``edgeadapt simulate`` has the whole protocol.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aggregation.groups import GroupSum
from aggregation.ring import dtype, packed_size
from aggregation.spec import SessionSpec
from client.training.engine import classifier_trainer
from client.training.examples import Score
from coordinator.settings import FederationSettings
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.rounds import ridge
from edgeadapt.rounds.analytic import AnalyticTask, ClassifierHead, contributed, moment_contribution
from edgeadapt.rounds.federatedmethods import METHODS
from edgeadapt.rounds.optimizer import AnalyticHead, Stateless
from edgeadapt.rounds.ridge import Matrix
from edgeadapt.rounds.roundtask import RoundOf, ServerStep, SummedRound
from edgeadapt.rounds.sums import noisy_vector
from simulations.data import populate
from simulations.data.population import Client, LabelledText
from simulations.engine import provision
from simulations.engine.canaries import CONFIDENCE, Sum, bounded
from simulations.engine.provision import training_base
from simulations.scenario import Scenario

FULL = (0.0, 16.0, 8.0, 4.0, 2.0, 1.0)  # of epsilon; 0: no noise
CANARIES = 1000
Notify = Callable[[str], None]
Embedded = tuple[Matrix, NDArray[np.int64]]  # embeddings, shape (n, hidden), and labels


@dataclass(frozen=True, slots=True)
class PrivacyRow:
    """One epsilon.

    Args:
        epsilon: Of one sum over the fewest survivors; None without noise.
        multiplier: Noise multiplier.
        ring_bits, bytes_up: Of a contribution.
        mean, p10, unseen: Accuracy over the clients that contributed, its 10th percentile, and the mean of the others.
        account: Epsilon of a sum in which all devices add their noise, as in this one.
        one_run, gaussian: Lower bounds on it from canaries (``engine.canaries``).
    """

    epsilon: float | None
    multiplier: float
    ring_bits: int
    bytes_up: int
    mean: float
    p10: float
    unseen: float
    account: float | None
    one_run: float | None
    gaussian: float | None


def curve(
    scenario: Scenario, epsilons: Sequence[float], out: Path, notify: Notify, *, canaries: int = CANARIES
) -> dict[str, object]:
    """The rows of a scenario's population on its frozen base.

    Args:
        scenario: Its federation says everything but epsilon and the number of rounds, which is one.
        epsilons: Of the rows; 0: without noise.
        out: Where a base is made, if the scenario makes one.
        notify: Takes what is done at the moment.
        canaries: Of each row, at least; they take as many sums as they need.

    Raises:
        ConfigError: No noise meets an epsilon, or as the parts.
    """
    notify("population")
    population = populate(scenario.data, scenario.population, scenario.seed).population
    base = training_base(out, scenario, population)
    manifest, blob = provision.first_adapter(scenario, population, base)
    tensors, mine = files.decode(blob), classifier_trainer(base, len(population.labels), manifest.peft_config)
    texts = list(dict.fromkeys(t.text for c in population.clients for t in (*c.train, *c.test)))
    notify(f"embedding {len(texts)} texts")
    found = dict(zip(texts, mine.embed(texts).astype(np.float64), strict=True))

    def embedded(some: Sequence[LabelledText]) -> Embedded:
        return np.stack([found[t.text] for t in some]), np.array([t.label for t in some], np.int64)

    devices = [embedded(client.train) for client in population.clients if not client.unseen]
    tests = [(client, *embedded(client.test)) for client in population.clients]
    layout, rows = Layout.of(tensors), []
    for epsilon in epsilons:
        notify(f"epsilon {epsilon:g}" if epsilon else "no noise")
        settings = _settings(scenario.federation, epsilon)
        of = RoundOf(manifest.peft_config, manifest.labels, 0, METHODS[settings.method], settings.privacy.noisy)
        task = settings.analytic.task(of)
        spec = settings.session_spec(len(devices), layout, base.digest, 1, task)
        after = _fitted(spec, task, tensors, manifest.sha256, devices)
        rows.append(_row(epsilon, spec, _accuracy(after, tests), canaries))
    return {
        "devices": len(devices),
        "texts": sum(len(labels) for _, labels in devices),
        "vendor": _accuracy(tensors, tests),
        "delta": scenario.federation.privacy.delta,
        "rows": [asdict(row) for row in rows],
    }


def _settings(federation: FederationSettings, epsilon: float) -> FederationSettings:
    chosen = {"mechanism": "skellam" if epsilon else "none", "epsilon": epsilon, "noise_multiplier": 0.0}
    return federation.model_copy(
        update={
            "rounds": 1,
            "analytic": federation.analytic.model_copy(update={"rounds": 1}),
            "privacy": federation.privacy.model_copy(update=chosen),
        }
    )


def _fitted(
    spec: SessionSpec, task: AnalyticTask, tensors: Tensors, digest: str, devices: Sequence[Embedded]
) -> Tensors:
    """The adapter with the head that the sum over all devices gives."""
    rng, head = np.random.default_rng(), ClassifierHead.of(Layout.of(tensors))
    total = np.zeros(spec.vector.size, dtype(spec.vector.ring_bits))
    for embeddings, labels in devices:
        if spec.privacy is None:
            mine = ridge.moments_of(embeddings, labels, head.labels)
            total += moment_contribution(mine, Score(0, 0, 0.0), spec, rng)
        else:
            vector = contributed(embeddings, labels, head, task, bytes.fromhex(digest))
            total += noisy_vector(vector, spec, bytes.fromhex(digest), rng, os.urandom(32))
    sums = [GroupSum.of(spec, tuple(map(str, range(len(devices)))), total)]
    summed = SummedRound(spec, tensors, bytes.fromhex(digest), sums)
    return task.next_adapter(summed, ServerStep(AnalyticHead(), Stateless()))[1]


def _accuracy(
    tensors: Tensors, tests: Sequence[tuple[Client, Matrix, NDArray[np.int64]]]
) -> tuple[float, float, float]:
    """Mean and 10th percentile of the clients that contributed, and the mean of the others."""
    head = ClassifierHead.of(Layout.of(tensors))
    weight, bias = tensors[head.weight].T, tensors[head.bias]
    right: dict[bool, list[float]] = {False: [], True: []}
    for client, embeddings, labels in tests:
        right[client.unseen].append(float(((embeddings @ weight + bias).argmax(axis=1) == labels).mean()))
    return float(np.mean(right[False])), float(np.percentile(right[False], 10)), float(np.mean(right[True]))


def _row(epsilon: float, spec: SessionSpec, accuracy: tuple[float, float, float], canaries: int) -> PrivacyRow:
    bits, size = spec.vector.ring_bits, packed_size(spec.vector.size, spec.vector.ring_bits)
    if spec.privacy is None:
        return PrivacyRow(None, 0.0, bits, size, *accuracy, None, None, None)
    devices, delta = spec.vector.max_clients, spec.privacy.delta
    corrupt = spec.minimum_survivors - spec.privacy.honest
    account = spec.spent(devices + corrupt).epsilon(delta)  # nobody leaves its noise out
    found = bounded([Sum(spec, devices)], account, delta, canaries)
    return PrivacyRow(epsilon, spec.noise_multiplier(), bits, size, *accuracy, account, found.one_run, found.gaussian)


def table(found: dict[str, object]) -> str:
    rows = [PrivacyRow(**row) for row in found["rows"]]  # type: ignore[attr-defined]
    vendor = found["vendor"]
    lines = [
        f"{found['devices']} devices with {found['texts']} training texts, one sum, delta {found['delta']:g}; "
        f"canaries' bounds at {CONFIDENCE:.0%}",
        "epsilon  multiplier  bits  bytes up   mean  10th pct.  unseen  all survive  canaries  if Gaussian",
        f"{'vendor':>7}{'':32}{vendor[0]:.3f}{vendor[1]:11.3f}{vendor[2]:8.3f}",  # type: ignore[index]
    ]
    for row in rows:
        line = f"{'none' if row.epsilon is None else f'{row.epsilon:g}':>7}{row.multiplier:12.3f}{row.ring_bits:6}"
        line += f"{row.bytes_up:10,}{row.mean:7.3f}{row.p10:11.3f}{row.unseen:8.3f}"
        if row.account is not None:
            line += f"{row.account:13.3f}{row.one_run:10.3f}{row.gaussian:13.3f}"
        lines.append(line)
    return "\n".join(lines)
