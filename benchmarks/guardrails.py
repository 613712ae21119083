"""What a policy's thresholds and denied labels do to the answers of a run of households.

    python -m benchmarks guardrails runs/demo

All households' validation phrases choose the thresholds; their test phrases, of other sentence templates, are what is
measured. The peer is the same adapter without a policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.inference.session import ClassificationSession
from edgeadapt.formats.policy import Outcome, Policy
from simulations.data import populate
from simulations.data.population import Client, LabelledText
from simulations.engine import provision
from simulations.scenario import Scenario

COVERAGE = 0.9
PRIOR = 5.0  # a label's quantile is that of all answers where it has few


@dataclass(frozen=True, slots=True)
class Answer:
    right: str
    label: str
    probability: float


def answers(run: Path, clients: Sequence[Client], labels: Sequence[str], adapter: str, part: str) -> list[Answer]:
    """What each household's bundle answers to its phrases of a part, without a policy."""
    found = []
    for client in clients:
        session = ClassificationSession.open(provision.device_folder(run, client.name) / "bundle")
        texts: Sequence[LabelledText] = getattr(client, part)
        for one in texts:
            (best,) = session.rank([one.text], adapter, 1)[0]
            found.append(Answer(labels[one.label], best.label, best.probability))
    return found


def thresholds(given: Sequence[Answer], coverage: float = COVERAGE) -> dict[str, float]:
    """Choose the least probability of each label, for which about ``coverage`` of the answers are above theirs.

    A label's answers are withheld the more, the more of them are wrong: as many as a logistic fit of "right" on the
    log-odds, with an intercept for each label that is shrunk towards 0, puts below one value for all labels.
    """
    names = sorted({one.label for one in given})
    odds = np.array([np.log(one.probability / max(1e-6, 1 - one.probability)) for one in given])
    right = np.array([one.right == one.label for one in given], np.float64)
    which = np.array([names.index(one.label) for one in given])
    slope, common, own = 1.0, 0.0, np.zeros(len(names))
    for _ in range(2000):  # gradient ascent; convex
        p = 1 / (1 + np.exp(-(slope * odds + common + own[which])))
        off = (right - p) / len(given)
        slope, common = slope + 0.5 * float(off @ odds), common + 2.0 * float(off.sum())
        own += 2.0 * (np.bincount(which, off, len(names)) - PRIOR * own / len(given) / 4)
    score = slope * odds + common + own[which]
    least = float(np.quantile(score, 1 - coverage))
    return {name: float(1 / (1 + np.exp(-(least - common - own[i]) / slope))) for i, name in enumerate(names)}


def measured(given: Sequence[Answer], policy: Policy) -> tuple[float, float, float]:
    """Coverage, accuracy of what is answered, and accuracy without the policy."""
    kept = [one for one in given if policy.outcome((), one.label, one.probability) is Outcome.ANSWERED]
    share = [sum(one.right == one.label for one in some) / max(1, len(some)) for some in (kept, given)]
    return len(kept) / len(given), share[0], share[1]


def denied(given: Sequence[Answer], labels: Sequence[str]) -> Mapping[str, tuple[float, float, int]]:
    """Of each label, if it alone is denied: blocked phrases of others, answered phrases of its own, its phrases."""
    table = {}
    for label in labels:
        policy = Policy(deny=(label,))
        blocked = [policy.outcome((), one.label, one.probability) is Outcome.BLOCKED for one in given]
        own = [not was for was, one in zip(blocked, given, strict=True) if one.right == label]
        others = [was for was, one in zip(blocked, given, strict=True) if one.right != label]
        assert all(was == (one.label == label) for was, one in zip(blocked, given, strict=True))  # noqa: S101
        table[label] = (sum(others) / len(others), sum(own) / max(1, len(own)), len(own))
    return table


def report(run: Path) -> list[str]:
    """A line for each adapter and policy; both are the ones that the global adapter's validation phrases choose."""
    scenario = Scenario.model_validate_json((run / "scenario.json").read_text())
    population = populate(scenario.data, scenario.population, scenario.seed).population
    clients, labels = population.clients, population.labels
    chosen = answers(run, clients, labels, "global", "validation")
    least = float(np.quantile([one.probability for one in chosen], 1 - COVERAGE))
    policies = {"by label": Policy(thresholds=thresholds(chosen)), "one for all": Policy(least=least)}
    lines = [f"thresholds from {len(chosen)} validation phrases", "adapter   thresholds    answered  right  without it"]
    for adapter in ("global", "personal"):
        given = answers(run, clients, labels, adapter, "test")
        exact = float(np.quantile([one.probability for one in given], 1 - COVERAGE))
        for name, policy in (policies | {"90 % of test": Policy(least=exact)}).items():
            coverage, accuracy, without = measured(given, policy)
            lines.append(f"{adapter:9} {name:12}  {coverage:8.1%}  {accuracy:5.1%}  {without:5.1%} of {len(given)}")
        table = denied(given, labels)
        weights = [count for _, _, count in table.values()]
        blocked, own = (np.average([row[i] for row in table.values()], weights=weights) for i in (0, 1))
        worst = max(table, key=lambda label: table[label][0])
        lines.append(f"{adapter:9} one label denied: blocked of the others {blocked:.2%}, at most")
        lines[-1] += f" {table[worst][0]:.2%} ({worst}); its own phrases answered with another label {own:.1%}"
    return lines
