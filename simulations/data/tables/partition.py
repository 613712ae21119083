"""Rows without clients, dealt out to clients by a partitioner of flwr-datasets."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from aggregation.errors import ConfigError
from simulations.data.tables.settings import DataSettings

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def partition(labels: Sequence[str], settings: DataSettings, seed: int) -> list[int]:
    """The client of each row, from 0; a client may get no row.

    Args:
        labels: Of the rows.
        settings: The rule, its numbers, and how many clients there are.
        seed: Not negative. The same rows, settings and seed give the same clients.

    Raises:
        ConfigError: So many clients cannot be made from these rows by this rule.
    """
    from datasets import Dataset

    order = np.random.default_rng(seed).permutation(len(labels))
    rule = _partitioner(settings, seed)
    owner = [0] * len(labels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each attempt at a Dirichlet draw
            rule.dataset = Dataset.from_dict({"row": order.tolist(), "label": [labels[row] for row in order]})
            for client in range(settings.clients):
                for row in rule.load_partition(client)["row"]:
                    owner[row] = client
    except ValueError as error:
        reason = f"{len(labels)} texts cannot be dealt out to {settings.clients} clients by {settings.partition}"
        raise ConfigError(f"{reason}: {' '.join(str(error).split())[:200]}", about="data.partition") from error
    return owner


def _partitioner(settings: DataSettings, seed: int) -> "Partitioner":
    from flwr_datasets import partitioner as rules

    count = settings.clients
    match settings.partition:
        case "iid":
            return rules.IidPartitioner(count)
        case "dirichlet":
            return rules.DirichletPartitioner(count, "label", settings.concentration, min_partition_size=0, seed=seed)
        case "shard":
            return rules.ShardPartitioner(count, "label", num_shards_per_partition=settings.shards, seed=seed)
        case "linear":
            return rules.LinearPartitioner(count)
        case "exponential":
            return rules.ExponentialPartitioner(count)
