"""What phrases that a grammar makes add to the few that a household has of each label.

    python -m benchmarks synthesis --bundle phone/bundle

A household that took part in nothing has three phrases of each of its labels, and more are made of the vendor's public
sentence templates with the household's own names of rooms and things. Left out is what it said and what is made twice
and, if filtered, what the first classifier, a head that all others' texts made, takes for another label. Its own head
is fitted to both ("logistic" of the personal step); its test phrases are of templates that no other texts have.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.questions import POPULATIONS, SEEDS, Embedded, embedding, shared_head
from client.inference.session import ClassificationSession
from client.training.hygiene import words
from client.training.logistic import Matrix, logistic_head, with_constant
from client.training.personal import PENALTY
from simulations.data import populate
from simulations.data.households import OF_HOUSEHOLDS, sampling
from simulations.data.households.speech import Template, Voice, pick
from simulations.data.population import Client, LabelledText

REAL = 3  # phrases of a label
MADE = (5, 20)  # phrases of a label
OURS = f"and {max(MADE)} made"
ATTEMPTS = 4  # sentences for each that is wanted


def few(client: Client) -> list[LabelledText]:
    """Keep the oldest phrases of each label."""
    kept = defaultdict[int, list[LabelledText]](list)
    for one in client.train:
        kept[one.label].append(one)
    return [one for texts in kept.values() for one in texts[:REAL]]


def made(voice: Voice, templates: Sequence[Template], known: Sequence[str], count: int) -> list[str]:
    """Speak different sentences of templates, none of which is ``known``; fewer if there are no more."""
    said, found = set(map(words, known)), list[str]()
    for _ in range(ATTEMPTS * count):
        text = voice.speak(pick(voice.rng, templates))
        if len(found) < count and words(text) not in said:
            said.add(words(text))
            found.append(text)
    return found


def measure(
    session: ClassificationSession, report: Callable[[str], object], seeds: Sequence[int] = SEEDS
) -> list[dict[str, float]]:
    """Measure the shares of right answers of each unseen household of each seed, by what its head was fitted to."""
    data, settings = POPULATIONS["households"]
    settings = settings.model_copy(update={"public_languages": OF_HOUSEHOLDS})
    embedded, rows = embedding(session), list[dict[str, float]]()
    for seed in seeds:
        report(f"seed {seed}")
        population = populate(data, settings, seed).population
        head = shared_head(population, embedded)
        _, books = sampling._phrasebooks(settings, seed)
        for number, client in enumerate(population.clients):
            if client.unseen:
                speaker = sampling._speaker(number, settings, books, seed)
                rows.append(_shares(head, client, speaker.voice, [one.public for one in speaker.splits], embedded))
    return rows


def _shares(
    head: Matrix,
    client: Client,
    voice: Voice,
    templates: Sequence[Sequence[Template]],
    embedded: Callable[[Sequence[LabelledText]], Embedded],
) -> dict[str, float]:
    test, own = embedded(client.test), few(client)
    known = [one.text for one in (*own, *client.test)]

    def right(more: Sequence[LabelledText], texts: Sequence[LabelledText] = own) -> float:
        x, labels = embedded([*texts, *more])
        fitted = logistic_head(with_constant(x), labels, np.ones(len(x)), head.shape[1], PENALTY, prior=head)
        return float(np.mean((with_constant(test[0]) @ fitted).argmax(axis=1) == test[1]))

    every = []
    for label in sorted({one.label for one in own}):
        every.append([LabelledText(text, label, "") for text in made(voice, templates[label], known, max(MADE))])
    x, labels = embedded([one for texts in every for one in texts])
    agreed = iter((with_constant(x) @ head).argmax(axis=1) == labels)
    kept = [[one for one in texts if next(agreed)] for texts in every]
    found = {f"{REAL} real": right(())}
    for count in MADE:
        for name, some in ((f"and {count} filtered", kept), (f"and {count} made", every)):
            found[name] = right([one for texts in some for one in texts[:count]])
    return found | {"all real": right((), client.train)}
