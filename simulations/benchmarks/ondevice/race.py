"""Rounds through all contenders in turn, and what the samples come to.

A turn's speed is that of its median token; other medians are over the rounds. A ratio is the median of the ratios
within each round, because what slows the machine slows neighbours in time alike.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from simulations.benchmarks.ondevice.contender import Contender

ARMS: dict[str, int | None] = {"base": None, "adapter": 0}  # → the place of the adapter to use
Note = Callable[[str], None]


@dataclass(slots=True)
class Speeds:
    """Tokens a second by round: of the base alone, and with the adapter."""

    base: list[float] = field(default_factory=list)
    adapter: list[float] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """The share of its speed that the adapter takes."""
        return 1 - ratio(self.adapter, self.base)

    def to_json(self) -> dict[str, float]:
        """Medians."""
        return {arm: statistics.median(getattr(self, arm)) for arm in ARMS}

    def spread(self) -> dict[str, list[float]]:
        """Least and most."""
        return {arm: [min(getattr(self, arm)), max(getattr(self, arm))] for arm in ARMS}


@dataclass(slots=True)
class Result:
    """One contender's speeds, and the milliseconds of each switch to the adapter."""

    decode: Speeds = field(default_factory=Speeds)
    prefill: Speeds = field(default_factory=Speeds)
    swap: list[float] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)  # arm → what it said


def ratio(ours: Sequence[float], peers: Sequence[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(ours, peers, strict=True))


def race(contenders: Sequence[Contender], prompt: Sequence[int], rounds: int, note: Note) -> Mapping[str, Result]:
    """Let each read ``prompt`` and go on, without and with the adapter, ``rounds`` times.

    Args:
        contenders: Loaded. Each round begins with another of them, and with another arm.
        prompt: Tokens.
        rounds: That count; one more before them warms up.
        note: Told of each turn.
    """
    found = {contender.spec.name: Result() for contender in contenders}
    for number in range(rounds + 1):
        start = number % len(contenders)
        for contender in [*contenders[start:], *contenders[:start]]:
            note(contender.spec.name)
            for arm in list(ARMS)[:: 1 if number % 2 else -1]:
                _turn(contender, arm, found[contender.spec.name], prompt, counts=number > 0)
    return found


def _turn(contender: Contender, arm: str, result: Result, prompt: Sequence[int], *, counts: bool) -> None:
    switched = contender.use(ARMS[arm])
    turn = contender.race(prompt, contender.spec.tokens)
    if counts:
        getattr(result.prefill, arm).append(len(prompt) / turn.prefill)
        # The median: a token during which the machine did something else is not the model's.
        getattr(result.decode, arm).append(1 / statistics.median(turn.steps))
        result.tokens[arm] = turn.tokens
        if arm == "adapter":
            result.swap.append(switched)
