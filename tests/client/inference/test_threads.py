"""Threads that share a session get the answers of the adapters that they ask: no tenant those of another's."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from client.inference.session import ClassificationSession, Prediction
from export.bundle.write import AdapterSource
from tests.support.models import Source

TENANTS = tuple(f"tenant-{number}" for number in range(8))
TEXT = "lock the door"
ROUNDS = 60
Ask = Callable[[str], Sequence[Prediction]]


class Selecting:
    """The interface that this one replaced: one call selects an adapter, another answers."""

    def __init__(self, session: ClassificationSession) -> None:
        self.session, self.selected = session, ""

    def ask(self, tenant: str) -> list[Prediction]:
        self.selected = tenant
        self.session.load(tenant)
        return self.session.rank([TEXT], self.selected, 4)[0]


@pytest.fixture
def session(bundle: Path, source: Source, add: Callable[[AdapterSource], None]) -> ClassificationSession:
    for number, name in enumerate(TENANTS):
        add(source(name, seed=20 + number))
    return ClassificationSession.open(bundle, loaded=5)  # fewer than there are tenants: some are always loaded anew


def wrong_answers(ask: Ask, expected: dict[str, list[Prediction]]) -> int:
    """Eight threads at once, each for one tenant; the number of answers that are another tenant's."""
    barrier = Barrier(len(TENANTS))

    def work(tenant: str) -> int:
        barrier.wait()
        return sum(ask(tenant) != expected[tenant] for _ in range(ROUNDS))

    with ThreadPoolExecutor(len(TENANTS)) as pool:
        return sum(pool.map(work, TENANTS))


def test_no_thread_gets_the_answer_of_another_tenants_adapter(session: ClassificationSession) -> None:
    expected = {tenant: session.rank([TEXT], tenant, 4)[0] for tenant in TENANTS}
    assert len({answer[0].probability for answer in expected.values()}) == len(TENANTS)
    assert wrong_answers(Selecting(session).ask, expected) > 0
    assert wrong_answers(lambda tenant: session.rank([TEXT], tenant, 4)[0], expected) == 0
    assert wrong_answers(lambda tenant: session.rank_mixed([(TEXT, tenant)], 4)[0], expected) == 0
