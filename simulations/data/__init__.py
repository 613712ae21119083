"""The populations of simulations: generated households, or texts of one's own."""

from simulations.data.households import PopulationSettings, sample_population
from simulations.data.tables import DataSettings, Loaded, load_population


def populate(data: DataSettings, households: PopulationSettings, seed: int) -> Loaded:
    """Make the population of a scenario: from ``data`` if it has texts, else households. Raises ConfigError."""
    data.require_texts()
    if data.given:
        return load_population(data, seed)
    return Loaded(sample_population(households, seed), None)
