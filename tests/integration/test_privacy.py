"""A federation with differential privacy on the in-process grid: the noise in its adapters is what it accounts for."""

from collections.abc import Callable
from typing import Any

import numpy as np

from client.training.engine import classifier_trainer
from client.training.examples import Split, in_split, read_examples
from edgeadapt.formats.layout import Layout
from edgeadapt.rounds.sums import clip
from tests.integration.test_federation import Orders, settings_of
from tests.integration.test_federation import orders as orders

FleetOf = Callable[..., Any]
DEVICES, CLIP = 10, 0.5


def test_each_adapter_is_the_plain_mean_with_noise_of_the_calibrated_scale(fleet_of: FleetOf, orders: Orders) -> None:
    fleet = fleet_of(
        DEVICES,
        rounds=2,
        aggregation__clip_norm=CLIP,
        privacy__mechanism="skellam",
        privacy__noise_multiplier=0.5,
    )
    records = fleet.federate(fleet.grid(app=orders, message_loss=0.0, forced_dropouts=1))
    settings, registry = settings_of(fleet), fleet.registry()
    moved = 0
    for record in records:
        assert record.version is not None
        assert record.spoiled is None
        assert record.metrics == {}
        before, after = registry.tensors(record.version - 1), registry.tensors(record.version)
        layout, task = Layout.of(before), settings.task(registry.version(record.version - 1).manifest)
        trainer = classifier_trainer(fleet.base, len(task.labels), task.peft_config)
        total = np.zeros(layout.size)
        for device in record.survivors:
            examples = in_split(read_examples(fleet.state_dir(device).examples, len(task.labels)), Split.TRAIN)
            rng = orders.found[device, record.version - 1]
            trained = trainer.train(before, examples, task, epochs=task.epochs, rng=rng)
            total += clip(layout.flatten(trained).astype(np.float64) - layout.flatten(before), CLIP)
        count = len(record.survivors)
        spec = settings.session_spec(DEVICES, layout, fleet.base.digest, 1, task)
        found = layout.flatten(after).astype(np.float64) - layout.flatten(before)
        noise = found - total / count
        scale = spec.vector.segments[0].noise / np.sqrt(count)
        assert 0.9 * scale < noise.std() < 1.1 * scale
        assert abs(noise.mean()) < 6 * scale / np.sqrt(noise.size)
        assert found @ total > 0  # the mean is in it
        moved += 1
    assert moved == 2
