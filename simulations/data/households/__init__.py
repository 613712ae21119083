"""The households of a voice assistant: what each of them says, and what each utterance may be used for. The utterances
are sampled from the sentence templates of the package ``home-assistant-intents``. The same settings and seed give the
same population on any machine (``Population.digest``)."""

from simulations.data.households.sampling import OF_HOUSEHOLDS, PopulationSettings, sample_population
from simulations.data.households.speech import plain_phrases, released_phrases

__all__ = ["OF_HOUSEHOLDS", "PopulationSettings", "plain_phrases", "released_phrases", "sample_population"]
