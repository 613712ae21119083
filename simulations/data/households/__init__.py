"""The households of a voice assistant: who they are, what they say, what each part of it may be used for.

Everything is sampled from the sentence templates of the package ``home-assistant-intents``; the same settings
and seed give the same population on any machine (``Population.digest``). This package decides what is said; how
a device stores it, learns from it or is judged by it is decided elsewhere.
"""

from simulations.data.households.sampling import sample_population
from simulations.data.households.settings import PopulationSettings
from simulations.data.households.values import Example, Household, Population

__all__ = ["Example", "Household", "Population", "PopulationSettings", "sample_population"]
