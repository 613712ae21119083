"""A trial fleet made by commands alone, from an empty folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgeadapt import program

AUTHORITY, COORDINATOR, FIRST = "authority", "coordinator", "first"
SCENARIO = """
name = "tiny"
base.model = '{base}'
network.message_loss = 0.0
personal.epochs = 1
export.minimum_agreement = 0.5
[population]
households = 5
languages = ["en"]
public_phrases = 1
utterances_min = 10
utterances_max = 14
test_utterances = 6
[federation]
"""  # of a few seconds; keys of the federation follow


def call(*arguments: object) -> None:
    """``edgeadapt`` in this process; an error is raised as what it is."""
    program.cli([str(argument) for argument in arguments], standalone_mode=False)


def make_trial_fleet(
    folder: Path,
    base: str,
    phrases: Iterable[tuple[str, str]],
    examples: Mapping[str, Iterable[tuple[str, int, str]]],
    *settings: str,
    rank: int = 8,
    bundles: Mapping[str, Path] | None = None,
) -> None:
    """An authority, a coordinator with version 0, and an enrolled device for each key of ``examples``.

    Args:
        folder: Empty.
        base: Of the coordinator and the devices.
        phrases: Labels and public phrases.
        examples: Device → its examples: text, label's number, split.
        settings: Of the federation, as ``KEY=VALUE``.
        rank: Of LoRA.
        bundles: Device → the bundle with which it trains in place of the base.
    """
    authority, coordinator = folder / AUTHORITY, folder / COORDINATOR
    call("authority", "init", authority, "--unencrypted")
    changes = [part for setting in settings for part in ("--set", setting)]
    call("coordinator", "init", coordinator, "--authority", authority / "authority.pem", *changes)
    (folder / "phrases.tsv").write_text("".join(f"{label}\t{phrase}\n" for label, phrase in phrases))
    made = ("--phrases", folder / "phrases.tsv", "--rank", rank, "--out", folder / FIRST)
    call("base", "start", "--base", base, *made)
    call("coordinator", "publish", coordinator, "--peft", folder / FIRST, "--base", base)
    for device, rows in examples.items():
        state_dir, certificate = folder / device, folder / f"{device}.pem"
        own = (bundles or {}).get(device, base)
        pinned = ("--authority", authority / "authority.pem", "--coordinator", coordinator / "coordinator.pem")
        limits = ("policy.minimum_cohort=3", "policy.minimum_survivors=2", "policy.answer_quantum_seconds=0")
        trial = [part for limit in limits for part in ("--set", limit)]
        call("device", "enrol", "--state", state_dir, "--name", device, "--base", own, *pinned, *trial)
        call("authority", "issue", authority, "--request", state_dir / "request.csr", "--out", certificate)
        call("device", "enrol", "--state", state_dir, "--certificate", certificate)
        lines = [json.dumps({"text": text, "label": label, "split": split}) for text, label, split in rows]
        (state_dir / "examples.jsonl").write_text("".join(f"{line}\n" for line in lines))
