"""How a household words a template: its own names, everyday numbers, and the most natural of a few attempts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aggregation.errors import ConfigError
from simulations.data.households.draws import pick
from simulations.data.households.expansion import Expander
from simulations.data.households.templates import Language, Template
from simulations.data.households.words import Home

# The package allows 0-100 °C or 100 hours; people say these. By the list's name or its type.
_EVERYDAY = {
    "percentage": range(5, 101, 5),
    "temperature": range(17, 25),  # °C
    "color_temperature": range(2200, 6501, 100),  # K
    "timer_hours": range(1, 9),
    "timer_minutes": range(1, 61),
    "timer_seconds": range(5, 60, 5),
}
_ATTEMPTS = 120


@dataclass(frozen=True, slots=True)
class Voice:
    """A household that speaks a language and has its own names for things. ``rng`` is the voice's own."""

    language: Language
    home: Home
    rng: np.random.Generator

    def say(self, template: Template) -> str:
        """A sentence of the template: the first of 120 attempts without a flaw, else the one with the fewest."""
        expander = Expander(self.language.rules, lambda name: self._slot(name, template.domains), self.rng)
        best, fewest = "", len(self.language.words.unnatural) + 1
        tried: set[str] = set()
        for _ in range(_ATTEMPTS):
            sentence = expander.sentence(template.text)
            if sentence in tried:
                continue
            tried.add(sentence)
            flaws = self.language.words.flaws(sentence, enough=fewest)
            if flaws < fewest:
                best, fewest = sentence, flaws
            if not flaws:
                break
        return best

    def _slot(self, name: str, domains: tuple[str, ...]) -> str:
        if name == "area":
            return pick(self.rng, self.home.areas)
        if name == "floor":
            return pick(self.rng, self.home.floors)
        if name == "name":
            return pick(self.rng, self.home.names(pick(self.rng, domains or ("light",))))
        if name not in self.language.lists:
            raise ConfigError(f"a sentence template asks for {{{name}}}, which home-assistant-intents does not define")
        return self._listed(name, self.language.lists[name], domains)

    def _listed(self, name: str, entries: Mapping[str, Any], domains: tuple[str, ...]) -> str:
        if "values" in entries:
            value = pick(self.rng, entries["values"])
            text = value if isinstance(value, str) else value["in"]
            return Expander(self.language.rules, lambda inner: self._slot(inner, domains), self.rng).sentence(text)
        if "range" in entries:
            return str(pick(self.rng, _numbers(name, entries["range"])))
        return pick(self.rng, self.language.words.phrases[name])


def _numbers(name: str, allowed: Mapping[str, Any]) -> range | list[int]:
    everyday = _EVERYDAY.get(name, _EVERYDAY.get(allowed.get("type", ""), range(0)))
    usual = [number for number in everyday if allowed["from"] <= number <= allowed["to"]]
    return usual or range(allowed["from"], allowed["to"] + 1, allowed.get("step", 1))
