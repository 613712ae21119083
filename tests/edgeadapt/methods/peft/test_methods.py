"""The tables of docs/reference/methods.md: every type of peft is read, or refused by name; nothing else happens."""

import re
from pathlib import Path

import pytest
from peft import PeftType

from aggregation.errors import ConfigError, DataError
from edgeadapt.methods.peft.config import HARMLESS, MERGED, config_of
from tests.support import refused

PAGE = Path("docs/reference/methods.md").read_text()
READ, REFUSED = (
    set(re.findall("`([A-Z_0-9]+)`", "".join(re.findall(r"^\| (`[^|]+)\|", section, re.M))))
    for section in PAGE.partition("## Methods")[2].split("## Refused")
)


RANKS: dict[str, dict[str, int]] = {  # of the methods that need one
    "LORA": {"r": 4, "lora_alpha": 8},
    "ADALORA": {"init_r": 4, "lora_alpha": 8},
    "LOHA": {"r": 4, "alpha": 8},
    "VERA": {"r": 4},
}


def test_the_page_says_which_types_can_be_merged() -> None:
    _, _, section = PAGE.partition("## Refused")
    rows = re.findall(r"^\| (`[^|]+)\|[^|]*\| (yes|no) \|$", section, re.M)
    merged = {name for names, said in rows if said == "yes" for name in re.findall("`([A-Z_0-9]+)`", names)}
    assert {name for names, _ in rows for name in re.findall("`([A-Z_0-9]+)`", names)} == REFUSED
    with_slots = re.findall("`([A-Z_0-9]+)`", section.partition("The types ")[2].partition("merged too")[0])
    assert merged == MERGED - HARMLESS.keys()
    assert set(with_slots) == MERGED & HARMLESS.keys()


def test_the_tables_have_every_type_once() -> None:
    assert READ.isdisjoint(REFUSED)
    assert {kind.value for kind in PeftType} == READ | REFUSED


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType))
def test_a_type_is_read_or_refused_as_the_page_says(kind: str) -> None:
    settings = {"peft_type": kind, "target_modules": ["query"]} | RANKS.get(kind, {})
    if kind in READ:
        assert config_of(settings).peft_type == kind
    else:
        with refused(ConfigError, "peft_type", value=kind) as caught:
            config_of(settings)
        assert ("'edgeadapt base merge'" in str(caught.value)) == (kind in MERGED)


@pytest.mark.parametrize("kind", [None, 3, [], {}, "lora", "LORA ", "NEW"])
def test_a_type_that_peft_does_not_have_is_refused(kind: object) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        config_of({"peft_type": kind})
    assert "\n" not in str(caught.value)
