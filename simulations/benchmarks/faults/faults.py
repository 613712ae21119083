"""The faults: what each does to the processes of a fleet, and at which steps of a round."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from aggregation.steps import Step
from simulations.benchmarks.faults.fleet import FaultFleet, wait_until
from simulations.benchmarks.faults.network import Damage, Link

LASTS = 3.0  # seconds of a disturbance that passes
ONE = (Step.PLAN,)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault.

    Attributes:
        name: On the command line.
        what: For people.
        inject: Do it while a step is under way; returns when it was over, or when it was done if it does not pass.
        stages: The steps at which it is done.
        superlink: Whether the fleet has Flower's SuperLink.
    """

    name: str
    what: str
    inject: Callable[[FaultFleet], float]
    stages: tuple[Step, ...] = tuple(Step)
    superlink: bool = False


def victim(fleet: FaultFleet) -> str:
    """The device whose steps are waited for, and whose process and network are disturbed."""
    return fleet.names[0]


def _kill(service: str) -> Callable[[FaultFleet], float]:
    def inject(fleet: FaultFleet) -> float:
        os.kill(fleet.pid(service), signal.SIGKILL)
        return time.monotonic()

    return inject


def _hang(service: str) -> Callable[[FaultFleet], float]:
    def inject(fleet: FaultFleet) -> float:
        os.kill(fleet.pid(service), signal.SIGSTOP)
        return time.monotonic()

    return inject


def _kill_up(fleet: FaultFleet) -> float:
    if fleet.up is None:
        raise AssertionError
    fleet.up.process.kill()
    at = time.monotonic()
    fleet.up.end()
    fleet.start()
    return at


def _kill_agent(fleet: FaultFleet) -> float:
    name = victim(fleet)
    fleet.agents[name].process.kill()
    at = time.monotonic()
    fleet.agents[name].end()
    fleet.attend(name)
    return at


def _hang_agent(fleet: FaultFleet) -> float:
    process = fleet.agents[victim(fleet)].process
    process.send_signal(signal.SIGSTOP)
    at = time.monotonic()
    rounds = len(fleet.records())
    wait_until(lambda: len(fleet.records()) > rounds, "a round without the device that hangs")
    process.send_signal(signal.SIGCONT)
    return at


def _rolling_restart(fleet: FaultFleet) -> float:
    fleet.stop()
    fleet.start()
    at = time.monotonic()
    for name in fleet.names:
        fleet.agents[name].end(signal.SIGTERM)
        fleet.attend(name)
    return at


def _on_link(disturb: Callable[[FaultFleet, Link], object], *, all_devices: bool = False) -> Callable[..., float]:
    def inject(fleet: FaultFleet) -> float:
        for name in fleet.names if all_devices else [victim(fleet)]:
            disturb(fleet, fleet.network.links[name])
        return time.monotonic()

    return inject


def _damage(damage: Damage) -> Callable[[FaultFleet, Link], object]:
    return lambda fleet, link: setattr(link, "damage", damage)


def _partition(fleet: FaultFleet) -> float:
    links = fleet.network.links.values()
    for link in links:
        link.refused = True
        fleet.network.cut(link)
    time.sleep(LASTS)
    for link in links:
        link.refused = False
    return time.monotonic()


def _slow(fleet: FaultFleet) -> float:
    links, rounds = fleet.network.links.values(), len(fleet.records())
    usual = {id(link): link.delay for link in links}
    for link in links:
        link.delay, link.back = 1.0, 1.0
    wait_until(lambda: len(fleet.records()) > rounds, "a round over a slow network")
    for link in links:
        link.delay, link.back = usual[id(link)], 0.0
    return time.monotonic()


FAULTS = (
    Fault("kill-up", "kill -9 of coordinator up, started again", _kill_up),
    Fault("kill-rounds", "kill -9 of the rounds with their gateway", _kill("rounds")),
    Fault("kill-agent", "kill -9 of a device's agent, started again", _kill_agent),
    Fault("hang-agent", "a device's agent hangs", _hang_agent, (Step.PLAN, Step.UNMASK)),
    Fault("hang-rounds", "the rounds with their gateway hang", _hang("rounds"), (Step.PLAN, Step.UNMASK)),
    Fault("rolling-restart", "stop and start of every process in turn", _rolling_restart, ONE),
    Fault("kill-superlink", "kill -9 of the SuperLink", _kill("superlink"), (Step.PLAN, Step.UNMASK), superlink=True),
    Fault("hang-superlink", "the SuperLink hangs", _hang("superlink"), ONE, superlink=True),
)
