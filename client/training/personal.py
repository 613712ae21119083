"""The personal adapter: made on the device from the global adapter, and kept unless another one is better. The device
decides with its own held-out examples, which are few: among three candidates the best on some 18 phrases is often not
the best. Public texts, some rehearsed and some counted, bound what it forgets. It never leaves the device."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import chain

import numpy as np

from aggregation.errors import DataError, EdgeAdaptError
from client.training.control import UNLIMITED, TrainingControl
from client.training.examples import Example, Score, Split, in_split, with_variants
from client.training.logistic import logistic_head, with_constant
from client.training.trainer import ClassifierTrainer
from edgeadapt.bases.tasks import Numbers
from edgeadapt.extensions import Extensions
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.rounds.analytic import ClassifierHead, refit
from edgeadapt.rounds.ridge import EmbeddingMoments, moments_of
from edgeadapt.rounds.task import Task

# Chosen for ``with_own_head`` on households of validation seeds: MiniLM and multilingual-e5-small are equally good with
# 0.3 to 1 (docs/decisions/0033-analytic-head.md).
OWN_STRENGTH = 0.5
CHANCE = 0.05
# Of "logistic", on half the sum of the squared weights. Chosen on households of validation seeds, as the layers below.
PENALTY = 0.01


class Candidate(Enum):
    """The adapters that a device chooses from, from the least to the most personal."""

    BASE = "base"
    GLOBAL = "global"
    PERSONAL = "personal"


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Public examples: those on which a personal adapter is trained too, and those by which its forgetting counts."""

    trained: Sequence[Example]
    counted: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Personalization:
    """What a device keeps, and why. ``judged``: the candidate that was chosen, which no held-out example was fitted to.
    ``adapter``: what is kept. If a regression made the chosen one, the head is then fitted to the held-out examples as
    well, so this adapter's score on them is too high. ``scores``: each candidate's score on the held-out examples."""

    chosen: Candidate
    judged: Tensors
    adapter: Tensors
    scores: Mapping[Candidate, Score]


FINE_TUNE, RIDGE, LOGISTIC = "fine-tune", "ridge", "logistic"
HEADS = (RIDGE, LOGISTIC)  # make a new head, without training


class Choice(Enum):
    """When a device keeps another candidate than the personal adapter."""

    BEST = "best"  # if it is better on the held-out examples
    SIGNIFICANT = "significant"  # if it is better on them by more than chance
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class PersonalStep:
    """The personal step.

    ``method``: the name of one of ``METHODS``, which makes the personal adapter from the global one. ``share``: of
    "interpolate": of the fine-tuned adapter, 0 to 1 (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
    ``patience``: epochs without a lower loss on the held-out examples after which training ends, with the best adapter
    until then (Prechelt 1998, "Early stopping - but when?"); 0: never. Not used without held-out examples."""

    epochs: int  # passes over the training examples; not used by ``HEADS``
    scale: float  # logit of a score of 1, for "ridge" and "ensemble"; equal to the federation's rounds'
    method: str = FINE_TUNE
    share: float = 0.5
    choice: Choice = Choice.BEST
    patience: int = 0


@dataclass(frozen=True, slots=True)
class PersonalInputs:
    trainer: ClassifierTrainer
    shared: Tensors  # the global adapter
    examples: Sequence[Example]  # of the device, all splits
    how: PersonalStep
    task: Task  # settings of the training
    train: Callable[..., Tensors]  # ``Trainer.train`` with order and limits of the device
    embed: Callable[[Sequence[Example]], Floats]  # ``embedded`` with the global adapter, each example once

    @property
    def own(self) -> tuple[Example, ...]:
        """Return the training examples; the others choose between the candidates."""
        return in_split(self.examples, Split.TRAIN)

    @property
    def varied(self) -> list[Example]:
        """Return the training examples and their variants, as ``train`` makes them."""
        return with_variants(self.own, self.task.variants)

    def tuned(self) -> Tensors:
        if not self.how.epochs:
            return self.shared
        return self.train(self.shared, self.own, self.task, epochs=self.how.epochs)


Method = Callable[[PersonalInputs], Tensors]  # returns tensors in the layout of the global adapter


def _ridge(inputs: PersonalInputs) -> Tensors:
    return with_own_head(inputs.trainer, inputs.shared, inputs.varied, scale=inputs.how.scale)


def _logistic(inputs: PersonalInputs) -> Tensors:
    head, own = ClassifierHead.of(Layout.of(inputs.shared)), inputs.varied
    x = with_constant(inputs.embed(own))
    labels = np.array([example.label for example in own], np.int64)
    prior = np.concatenate([inputs.shared[head.weight].T, inputs.shared[head.bias][None]]).astype(np.float64)
    fitted = logistic_head(x, labels, np.ones(len(own)), head.labels, PENALTY, prior=prior).astype(np.float32)
    return inputs.shared | {head.weight: fitted[:-1].T.copy(), head.bias: fitted[-1]}


def _ensemble(inputs: PersonalInputs) -> Tensors:
    return with_both_heads(inputs.trainer, inputs.tuned(), inputs.shared, inputs.varied, scale=inputs.how.scale)


def _interpolate(inputs: PersonalInputs) -> Tensors:
    return _between(inputs.shared, inputs.tuned(), inputs.how.share)


METHODS = Extensions[Method](
    "edgeadapt.personal_steps",
    "personal step",
    "method",
    {
        FINE_TUNE: PersonalInputs.tuned,
        RIDGE: _ridge,
        LOGISTIC: _logistic,
        "ensemble": _ensemble,
        "interpolate": _interpolate,
    },
)


def personalize(  # noqa: PLR0913  # three of them by name
    trainer: ClassifierTrainer,
    candidates: Mapping[Candidate, Tensors],
    examples: Sequence[Example],
    task: Task,
    how: PersonalStep,
    *,
    rng: np.random.Generator,
    plain: Sequence[Example] = (),
    control: TrainingControl = UNLIMITED,
    rows: dict[str, Floats] | None = None,
) -> Personalization:
    """Make a personal adapter from the global one and the training examples, and keep it or another candidate.

    Args:
        examples: Of the device, all splits.
        how: The step; fine-tuning for 0 epochs makes nothing, and leaves ``candidates`` to choose from.
        rng, control: As for ``Trainer.train``.
        plain: Public texts of which the personal adapter must answer as many right as the global one (``rehearsal``).
            One that does not is moved towards the global adapter, in quarters of the way, until it does; it is not a
            candidate if only the global adapter does.

        rows: Texts that the global adapter has embedded already, to which others are added; None: of no caller.

    Returns:
        With ``Choice.BEST``, the candidate with the most correct answers on the held-out examples, among equals that
        with the least loss, among these the most personal. With ``SIGNIFICANT``, the best of those that are better than
        the most personal one by a sign test (``better_by_chance``) at ``CHANCE``; it, if there are none. Without
        held-out examples the most personal candidate. Of a personal adapter that one of ``HEADS`` made, the head is
        then fitted to training and held-out examples together; ``plain`` bounds what that forgets, too.

    Raises DataError as ``Trainer.train`` and ``with_own_head``, or a method of others failed or returned other tensors
    than an adapter has; ConfigError: the method is not installed."""
    method = METHODS.find(how.method)
    adapters, held_out = dict(candidates), in_split(examples, Split.VALIDATION)
    if how.patience and held_out:
        control = replace(control, patience=how.patience, held_out=lambda found: trainer.score(found, held_out).loss)

    rows = {} if rows is None else rows

    def made(of: Sequence[Example]) -> Tensors | None:
        shared, train = candidates[Candidate.GLOBAL], partial(trainer.train, rng=rng, control=control)
        embed = partial(_embedded_once, rows, trainer, shared)
        own = _applied(method, PersonalInputs(trainer, shared, of, how, task, train, embed))
        return _remembering(trainer, shared, own, plain)

    if (how.epochs or how.method != FINE_TUNE) and (own := made(examples)) is not None:
        adapters[Candidate.PERSONAL] = own
    scores = {candidate: trainer.score(adapter, held_out) for candidate, adapter in adapters.items()}
    order = list(Candidate)
    last = max(adapters, key=order.index)
    allowed = [*adapters] if how.choice is Choice.BEST else [last]
    if how.choice is Choice.SIGNIFICANT and held_out:
        rated = {candidate: _rated(trainer, adapter, held_out) for candidate, adapter in adapters.items()}
        better = [c for c in adapters if c is not last and better_by_chance(rated[c], rated[last]) <= CHANCE]
        allowed = better or allowed
    chosen = max(allowed, key=lambda c: (scores[c].correct, -scores[c].loss, order.index(c)))
    kept = adapters[chosen]
    if chosen is Candidate.PERSONAL and how.method in HEADS and held_out:
        every = [replace(each, split=Split.TRAIN) if each.split is Split.VALIDATION else each for each in examples]
        if (again := made(every)) is not None:
            kept = again
    return Personalization(chosen, adapters[chosen], kept, scores)


def rehearsal(
    trainer: ClassifierTrainer, examples: Sequence[Example], public: Sequence[Example], each: int
) -> Rehearsal:
    """Choose public examples to rehearse, so that training does not unlearn them, and others to count.

    See Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal". ``examples``: of the device, all splits.
    Public examples that the model reads as one of these are left out. ``public``: training examples, of any labels and
    languages. ``each``: number of each label that are rehearsed, those in the device's words (``in_own_words``); of the
    others the first and the last are counted: one in its languages, and one in another, if there are any. 0: none."""
    read = set(map(tuple, trainer.tokens([example.text for example in examples])))
    ordered = in_own_words(trainer, public, in_split(examples, Split.TRAIN))
    texts = zip(ordered, trainer.tokens([example.text for example in ordered]), strict=True)
    unlike = [example for example, ids in texts if tuple(ids) not in read]
    labels = sorted({example.label for example in unlike}) if each else []
    by_label = [[example for example in unlike if example.label == label] for label in labels]
    others = [some[each:] for some in by_label]
    counted = [some[0] for some in others if some] + [some[-1] for some in others if len(some) > 1]
    return Rehearsal([example for some in by_label for example in some[:each]], counted)


def in_own_words(trainer: ClassifierTrainer, examples: Sequence[Example], own: Sequence[Example]) -> list[Example]:
    """Sort examples by the share of their tokens that a device's own examples have, the largest first. So those in the
    languages of the device come first, and nobody says which these are."""
    own_tokens = {token for ids in trainer.tokens([example.text for example in own]) for token in ids}
    texts = trainer.tokens([example.text for example in examples])
    shares = [sum(token in own_tokens for token in ids) / max(len(ids), 1) for ids in texts]
    return [examples[i] for i in sorted(range(len(examples)), key=lambda i: -shares[i])]


def _applied(method: Method, inputs: PersonalInputs) -> Tensors:
    name = f"the personal step {inputs.how.method!r}"
    try:
        own = method(inputs)
    except (EdgeAdaptError, OSError):  # a full disk
        raise
    except Exception as error:  # of a method of others
        raise DataError(f"{name} failed: {type(error).__name__}: {error}", about="method") from error
    try:
        Layout.of(inputs.shared).check(own)
    except DataError as error:
        raise DataError(f"{name} made another adapter than it got: {error}", about="method") from error
    return own


def _between(shared: Tensors, own: Tensors, share: float) -> Tensors:
    return {name: np.float32(share) * own[name] + np.float32(1 - share) * shared[name] for name in shared}


def _remembering(trainer: ClassifierTrainer, shared: Tensors, own: Tensors, plain: Sequence[Example]) -> Tensors | None:
    """Choose the personal adapter, or the first on the way to the shared one that answers as many texts right."""
    if not plain:
        return own
    least = trainer.score(shared, plain).correct
    nearer = (_between(shared, own, share) for share in (0.75, 0.5, 0.25))
    return next((found for found in chain([own], nearer) if trainer.score(found, plain).correct >= least), None)


def better_by_chance(one: Numbers, other: Numbers) -> float:
    """Compute by a one-sided sign test how likely one of two equally good adapters is better so often at least.

    Only examples count on which the scores differ (McNemar 1947); 1 if there are none.

    >>> better_by_chance(np.array([1.0] * 5), np.array([0.0] * 5))
    0.03125
    """
    wins, losses = int((one > other).sum()), int((other > one).sum())
    total = wins + losses
    return float(sum(math.comb(total, k) for k in range(wins, total + 1)) / 2**total)


def _rated(trainer: ClassifierTrainer, adapter: Tensors, examples: Sequence[Example]) -> Numbers:
    return trainer.rated(trainer.logits(adapter, [example.text for example in examples]), examples)[0]


def with_own_head(
    trainer: ClassifierTrainer,
    adapter: Tensors,
    examples: Sequence[Example],
    *,
    scale: float,
    strength: float = OWN_STRENGTH,
) -> Tensors:
    """Fit the adapter's head to the training examples as well, by one regression and no training.

    The previous head stands for the examples of all others (``edgeadapt.rounds.ridge``). After a round of the analytic
    head, this gives a device what adding its own moments once more to the sum of all would give (docs/decisions/0033),
    and needs nothing of that sum. ``scale``: logit of a score of 1, as of the federation's rounds. ``strength``: as
    many examples as the previous head counts for in each direction. Raises DataError: the adapter has no classification
    head, or an embedding is not finite."""
    return refit(adapter, own_moments(trainer, adapter, examples), strength=strength, scale=scale)


def with_both_heads(
    trainer: ClassifierTrainer, tuned: Tensors, shared: Tensors, examples: Sequence[Example], *, scale: float
) -> Tensors:
    """Sum two heads of a fine-tuned adapter: its own, and the shared one fitted to the device's examples. The logits of
    two heads on one embedding add up to those of one, so the ensemble is an adapter like every other. ``tuned``: the
    fine-tuned adapter, whose embeddings both heads read. Raises DataError as ``with_own_head``."""
    head = ClassifierHead.of(Layout.of(tuned))
    names = (head.weight, head.bias)
    own = with_own_head(trainer, tuned | {name: shared[name] for name in names}, examples, scale=scale)
    return tuned | {name: tuned[name] + own[name] for name in names}


def own_moments(trainer: ClassifierTrainer, adapter: Tensors, examples: Sequence[Example]) -> EmbeddingMoments:
    """Compute the moments of the embedded training examples. Raises DataError if the adapter does not have a head."""
    own = in_split(examples, Split.TRAIN)
    labels = np.array([example.label for example in own], np.int64)
    return moments_of(embedded(trainer, adapter, own), labels, ClassifierHead.of(Layout.of(adapter)).labels)


def embedded(trainer: ClassifierTrainer, adapter: Tensors, examples: Sequence[Example]) -> Floats:
    """Embed, shape ``(len(examples), width)``; zeros for an example that overflows, which counts all the same."""
    embeddings = trainer.embed([example.text for example in examples], adapter)
    return np.where(np.isfinite(embeddings).all(axis=1, keepdims=True), embeddings, np.float32(0))


def _embedded_once(
    rows: dict[str, Floats], trainer: ClassifierTrainer, adapter: Tensors, examples: Sequence[Example]
) -> Floats:
    """Embed as ``embedded``; ``rows`` keeps what each text got."""
    missing = list({example.text: example for example in examples if example.text not in rows}.values())
    if missing:
        rows.update(zip((one.text for one in missing), embedded(trainer, adapter, missing), strict=True))
    return np.stack([rows[example.text] for example in examples])
