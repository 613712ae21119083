"""The page on a Flower deployment makes a fleet by commands alone. From TLS on, the steps are Flower's."""

from collections.abc import Callable
from typing import Any

import pytest

from client.node.statedir import DeviceStateDir
from client.training.examples import Split, read_examples
from coordinator.statedir import CoordinatorStateDir

DEVICES = ("kitchen", "garage", "hall")


@pytest.mark.slow
def test_the_fleet_of_the_page_is_ready_for_its_first_round(reader: Any, blocks: Callable[[str], list[Any]]) -> None:
    commands = [block.commands for block in blocks("how-to/flower.md")]
    ours = [text for text in commands if "openssl" not in text and "flower-" not in text]
    reader.run("\n".join(ours[:4]))
    fleet = reader.folder / "try"
    state_dir = CoordinatorStateDir.open(fleet / "coordinator")
    manifest = state_dir.registry.version(0).manifest
    state_dir.registry.close()
    assert manifest.labels == ("light_on", "light_off")
    for name in DEVICES:
        device = DeviceStateDir.open(fleet / name)
        assert device.settings.policy.minimum_cohort == len(DEVICES)
        assert device.settings.policy.minimum_survivors == 2
        splits = [example.split for example in read_examples(device.examples, len(manifest.labels))]
        assert (splits.count(Split.TRAIN), splits.count(Split.VALIDATION)) == (3, 1)
