"""One random sentence of a hassil template.

hassil's own sampler lists every sentence of a template, and one template can have millions: this one walks the
parsed expression once and takes one branch at each fork.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from simulations.data.households.draws import pick
from simulations.data.households.packages import hassil_module


@cache
def _parse(template: str) -> Any:
    return hassil_module("parse_expression").parse_sentence(template).expression


@dataclass(frozen=True, slots=True)
class Expander:
    """Expands templates of one language.

    Attributes:
        rules: Bodies of the ``<rules>`` that a template may refer to.
        slot: Gives a text for the list of that name, for a ``{list}`` in a template.
        rng: Takes the branches.
    """

    rules: Mapping[str, str]
    slot: Callable[[str], str]
    rng: np.random.Generator

    def sentence(self, template: str) -> str:
        """A random sentence of ``template``, single-spaced; every branch of a fork is equally likely."""
        return " ".join(self._walk(_parse(template)).split())

    def _walk(self, node: Any) -> str:
        kinds = hassil_module("expression")
        if isinstance(node, kinds.TextChunk):
            return str(node.original_text)
        if isinstance(node, kinds.ListReference):
            return self.slot(node.list_name)
        if isinstance(node, kinds.RuleReference):
            return self._walk(_parse(self.rules[node.rule_name]))
        if isinstance(node, kinds.Alternative):
            return self._walk(pick(self.rng, node.items))
        items = node.items
        if isinstance(node, kinds.Permutation):
            items = [items[i] for i in self.rng.permutation(len(items))]
        return "".join(self._walk(item) for item in items)
