"""A population from texts of one's own: tables, folders, or a function (``[data]`` of a scenario)."""

from simulations.data.tables.clients import DataFacts, Loaded, load_population
from simulations.data.tables.rows import DataSettings

__all__ = ["DataFacts", "DataSettings", "Loaded", "load_population"]
