"""The tables of docs/reference/methods.md: every type of peft is read, or refused by name; nothing else happens."""

import re
from pathlib import Path

import pytest
from peft import PeftType

from adapters.peft.config import config_of
from aggregation.errors import ConfigError, DataError
from tests.support import refused

PAGE = Path("docs/reference/methods.md").read_text()
READ, REFUSED = (
    set(re.findall("`([A-Z_0-9]+)`", "".join(re.findall(r"^\| (`[^|]+)\|", section, re.M))))
    for section in PAGE.partition("## Methods")[2].split("## Refused")
)


def test_the_tables_have_every_type_once() -> None:
    assert READ.isdisjoint(REFUSED)
    assert {kind.value for kind in PeftType} == READ | REFUSED


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PeftType))
def test_a_type_is_read_or_refused_as_the_page_says(kind: str) -> None:
    settings = {"peft_type": kind, "target_modules": ["query"], "r": 4, "alpha": 8, "lora_alpha": 8}
    if kind in ("IA3", "LN_TUNING", "BEFT"):
        del settings["r"], settings["alpha"], settings["lora_alpha"]
    elif kind == "LORA":
        del settings["alpha"]
    elif kind == "VERA":
        del settings["alpha"], settings["lora_alpha"]
    elif kind in ("LOHA", "ADALORA"):
        del settings["lora_alpha" if kind == "LOHA" else "alpha"]
    if kind in READ:
        assert config_of(settings).target_modules == ("query",)
    else:
        with refused(ConfigError, "peft_type", value=kind):
            config_of(settings)


@pytest.mark.parametrize("kind", [None, 3, [], {}, "lora", "LORA ", "NEW"])
def test_a_type_that_peft_does_not_have_is_refused(kind: object) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        config_of({"peft_type": kind})
    assert "\n" not in str(caught.value)
