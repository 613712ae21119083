"""Commands to an assistant, each of whose words has a label: what the command is about, such as a room or a time.

Households say them (``households.speech``), each with names of its own for rooms, devices and people, by the sentence
templates of ``home-assistant-intents``. A template of tests is nobody's in training.
"""

from collections.abc import Iterator

import numpy as np

from simulations.data.households import speech

HOUSEHOLDS, TRAIN, TEST = 30, 60, 30  # commands of each
CONCENTRATION = 0.5  # of the Dirichlet distribution of a household's intents
SEED = 0


def rows() -> Iterator[dict[str, str]]:
    """Yield the commands, for ``data.function`` with ``data.task = "words"``."""
    language = speech.load_language("en")
    splits = [
        split
        for intent, templates in language.templates.items()
        if (split := speech.split_templates(templates, f"en/{intent}", SEED, public=True))
    ]
    for number in range(HOUSEHOLDS):
        rng = speech.stream(SEED, number)
        voice = speech.Voice(language, speech.draw_names(language.words, rng), rng)
        mix = rng.dirichlet(np.full(len(splits), CONCENTRATION))
        for part, count in (("train", TRAIN), ("test", TEST)):
            for split in rng.choice(len(splits), count, p=mix):
                template = speech.pick(rng, splits[split].train if part == "train" else splits[split].test)
                text = voice.speak(template, labelled=True)
                yield {"client": f"home-{number:02}", "text": text, "split": part}
