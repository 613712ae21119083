"""Clients chosen from a population."""

import pytest

from simulations.data.population import Client, Population


def population(seen: int, unseen: int) -> Population:
    """With every unseen client after the seen ones."""
    clients = (Client(f"client-{n:03d}", "", n >= seen, (), (), ()) for n in range(seen + unseen))
    return Population((), (), tuple(clients))


@pytest.mark.parametrize(
    ("seen", "unseen", "count", "expected"),
    [(80, 20, 10, 2), (80, 20, 99, 20), (99, 1, 10, 1), (3, 97, 10, 9), (1, 99, 2, 1), (50, 0, 10, 0), (5, 5, 3, 2)],
)
def test_a_sample_keeps_the_share_of_unseen_clients_and_has_both_kinds(
    seen: int, unseen: int, count: int, expected: int
) -> None:
    whole = population(seen, unseen)
    chosen = whole.sampled(count, 0).clients
    assert len(chosen) == count
    assert sum(client.unseen for client in chosen) == expected
    assert [client for client in whole.clients if client in chosen] == list(chosen)  # none twice, in order


def test_a_population_that_has_no_more_clients_stays_whole() -> None:
    whole = population(4, 2)
    assert whole.sampled(6, 0) is whole.sampled(200, 0) is whole


def test_the_seed_determines_the_sample_and_every_client_can_be_in_one() -> None:
    whole = population(8, 4)
    assert whole.sampled(3, 5) == whole.sampled(3, 5)
    found = {client.name for seed in range(60) for client in whole.sampled(3, seed).clients}
    assert found == {client.name for client in whole.clients}
