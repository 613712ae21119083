"""The Flower grid over the gateway: what a check of arrivals costs."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from flwr.app import Message

from aggregation.steps import Step
from coordinator.gateway.grid import GatewayGrid, JoinedGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.transport import Reply, Transport
from edgeadapt.formats.gateway.messages import node_of
from simulations.engine.grid import FaultModel, InProcessGrid
from tests.coordinator.gateway.conftest import LIMITS, Site, SiteOf
from tests.support.gateway import HOST, server_tls
from tests.support.lightdevice import PATIENCE, LightDevice


class CountingGrid(GatewayGrid):
    pulls = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        return super().pull_messages(message_ids)


@contextmanager
def grid_of(site: Site, limits: GatewayLimits = LIMITS) -> Iterator[CountingGrid]:
    """A grid whose gateway has the authority of a site; its devices are closed with the site."""
    grid = CountingGrid(f"{HOST}:0", server_tls(site.authority), lambda at: site.roots[-1], limits)
    try:
        yield grid
    finally:
        grid.close()


def device_at(grid: GatewayGrid, site: Site, name: str) -> LightDevice:
    site.devices.append(LightDevice(grid.gateway, site.authority, name))
    return site.devices[-1]


def test_answers_that_come_one_by_one_are_pulled_once_each_in_the_order_of_arrival(site_of: SiteOf) -> None:
    """With a pull for each request that waits, at each arrival, a round cost the square of the number of devices."""
    site = site_of()
    with grid_of(site) as grid:
        order = sorted((f"device-{number}" for number in range(12)), key=node_of, reverse=True)
        talks = {name: device_at(grid, site, name).attend() for name in order}
        for tried in (grid, JoinedGrid(InProcessGrid(print, {}, FaultModel(0, 0.0, 1.0)), grid)):
            grid.pulls, replies = 0, queue.Queue[Reply]()
            asking = threading.Thread(target=ask_all, args=(Transport(tried, grid.clock, PATIENCE), replies))
            asking.start()
            arrived = []
            for name in order:
                talks[name].answer(talks[name].request().id, name.encode())
                arrived.append(replies.get(timeout=PATIENCE).body)
            asking.join()
            assert arrived == [name.encode() for name in order]
            assert grid.pulls == len(order)


def ask_all(transport: Transport, replies: "queue.Queue[Reply]") -> None:
    for reply in transport.ask(Step.PLAN, dict.fromkeys(transport.nodes(), b"plan"), "1"):
        replies.put(reply)
