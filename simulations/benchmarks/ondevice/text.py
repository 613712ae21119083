"""What the language model reads: phrases of English households, as lines of text, cut into windows of tokens.

They come from the population of the simulations, so nothing is fetched. The test phrases are from templates that no
training phrase came from.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from simulations.data.households import PopulationSettings, Utterance, sample_population

Tokens = NDArray[np.int64]
WINDOW = 64  # tokens
HELD_OUT = 24  # windows
HOUSEHOLDS = PopulationSettings(
    households=12, languages=("en",), utterances_min=150, utterances_max=200, test_utterances=60
)


@dataclass(frozen=True, slots=True)
class Text:
    """Windows to train on and to test with: each of shape ``(windows, WINDOW)``."""

    train: Tokens
    test: Tokens

    def prompt(self, length: int) -> list[int]:
        """So many tokens of test text, from its start over again if it is short."""
        return [int(token) for token in np.resize(self.test.reshape(-1), length)]


def household_text(tokenizer: Tokenizer, seed: int) -> Text:
    """Sample the phrases and cut them up; the same seed and tokenizer give the same tokens on any machine.

    Raises:
        ConfigError: The packages of the population are missing.
    """
    homes = sample_population(HOUSEHOLDS, seed).households
    train = _windows(tokenizer, (example for home in homes for example in home.train))
    return Text(train, _windows(tokenizer, (example for home in homes for example in home.test))[:HELD_OUT])


def _windows(tokenizer: Tokenizer, said: Iterable[Utterance]) -> Tokens:
    ids = np.array(tokenizer.encode("\n".join(example.text for example in said), add_special_tokens=False).ids)
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
