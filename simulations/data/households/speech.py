"""How a household says a template: a random expansion with the household's own names and everyday numbers.

hassil's own sampler lists every sentence of a template, and one template can have millions. ``Expander`` walks the
parsed expression once and takes one branch at each alternative.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from aggregation.errors import ConfigError
from simulations.data.households.draws import pick
from simulations.data.households.templates import Language, Template, hassil_module
from simulations.data.households.words import HouseholdNames

# The package allows 0-100 °C or 100 hours; these are the values that people say. By the list's name or its type.
_EVERYDAY = {
    "percentage": range(5, 101, 5),
    "temperature": range(17, 25),  # °C
    "color_temperature": range(2200, 6501, 100),  # K
    "timer_hours": range(1, 9),
    "timer_minutes": range(1, 61),
    "timer_seconds": range(5, 60, 5),
}
_ATTEMPTS = 120


@cache
def parse(template: str) -> Any:
    """The parsed expression of a hassil template."""
    return hassil_module("parse_expression").parse_sentence(template).expression


@dataclass(frozen=True, slots=True)
class Expander:
    """Expands the templates of one language.

    Attributes:
        rules: Bodies of the ``<rules>`` that a template may refer to.
        slot: Gives a text for a ``{list}`` of a template, from the list's name.
        rng: Takes the branches.
    """

    rules: Mapping[str, str]
    slot: Callable[[str], str]
    rng: np.random.Generator

    def sentence(self, template: str) -> str:
        """A random sentence of ``template``, single-spaced; each branch of an alternative has the same probability."""
        return " ".join(self._walk(parse(template)).split())

    def _walk(self, node: Any) -> str:
        kinds = hassil_module("expression")
        if isinstance(node, kinds.TextChunk):
            return str(node.original_text)
        if isinstance(node, kinds.ListReference):
            return self.slot(node.list_name)
        if isinstance(node, kinds.RuleReference):
            return self._walk(parse(self.rules[node.rule_name]))
        if isinstance(node, kinds.Alternative):
            return self._walk(pick(self.rng, node.items))
        items = node.items
        if isinstance(node, kinds.Permutation):
            items = [items[i] for i in self.rng.permutation(len(items))]
        return "".join(self._walk(item) for item in items)


@dataclass(frozen=True, slots=True)
class Voice:
    """A household's way of speaking: a language, its own names for things, and its own randomness."""

    language: Language
    names: HouseholdNames
    rng: np.random.Generator

    def speak(self, template: Template) -> str:
        """A sentence of the template: the first of 120 attempts without a flaw, or the one with the fewest flaws."""
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
            return pick(self.rng, self.names.areas)
        if name == "floor":
            return pick(self.rng, self.names.floors)
        if name == "name":
            return pick(self.rng, self.names.of_kind(pick(self.rng, domains or ("light",))))
        if name not in self.language.lists:
            raise ConfigError(
                f"a sentence template uses the list {{{name}}}, which home-assistant-intents does not define; "
                "install the version that edgeadapt[simulations] names",
                about="home-assistant-intents",
                value=name,
            )
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
