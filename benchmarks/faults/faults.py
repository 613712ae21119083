"""The faults: what each does to the processes of a fleet, and at which steps of a round."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from aggregation.steps import Step
from benchmarks.faults.fleet import LIGHT, Damage, FaultFleet, FleetShape, Link, Network
from benchmarks.faults.postgresql import missing
from benchmarks.faults.processes import children, wait_until
from coordinator.services.deployment import running

SIZE = 64  # MiB
FILLER = "filler"
_CHUNK = 2**16  # bytes


def refused() -> str:
    """Why no disk can be mounted; empty if one can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount(Path(folder))
        except (OSError, subprocess.CalledProcessError):
            return "mount is refused (run it as root, or with 'unshare -rm' before the command)"
        _unmount(Path(folder))
    return ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Move a folder to a disk of its own while the block runs. No process uses it before and after that."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    folder.mkdir(mode=0o700)
    try:
        _mount(folder)
    except (OSError, subprocess.CalledProcessError):
        folder.rmdir()
        aside.rename(folder)
        raise
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        shutil.rmtree(aside)
        yield
    finally:
        if not aside.exists():
            shutil.copytree(folder, aside)
        _unmount(folder)
        folder.rmdir()
        aside.rename(folder)


def fill(folder: Path) -> None:
    """Write until the disk of a folder is full. Raises OSError: it failed in another way."""
    size = _CHUNK
    with (folder / FILLER).open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2  # up to the last byte


def empty(folder: Path) -> None:
    (folder / FILLER).unlink()


def _mount(folder: Path) -> None:
    options = f"size={SIZE}m,mode=0700"
    _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))


def _unmount(folder: Path) -> None:
    _run("umount", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603


LASTS = 3.0  # seconds of a disturbance that passes
ONE = (Step.PLAN,)
ANSWERS = (Step.PLAN, Step.UNMASK)
MIXED = FleetShape(superlink=True, supernodes=1)
SUPERLINK, SHARED = FleetShape(superlink=True), FleetShape(coordinators=2)
OLDER = "0.0.1"  # a version below the least one


@dataclass(frozen=True, slots=True)
class Fault:
    name: str  # on the command line
    what: str  # for people
    inject: Callable[[FaultFleet], float]  # does it while a step is under way, and returns when it was over or done
    stages: tuple[Step, ...] = tuple(Step)  # at which it is done
    shape: FleetShape = LIGHT
    missing: Callable[[], str] = lambda: ""  # why it cannot be done on this machine
    setting: Callable[[FaultFleet], AbstractContextManager[None]] = lambda fleet: nullcontext()


def victim(fleet: FaultFleet) -> str:
    """The device whose steps are waited for, and whose process and network are disturbed."""
    return fleet.names[0]


def _send(number: signal.Signals, service: str) -> Callable[[FaultFleet], float]:
    def inject(fleet: FaultFleet) -> float:
        os.kill(fleet.first.pid(service), number)
        return time.monotonic()

    return inject


def _kill_up(fleet: FaultFleet) -> float:
    at = time.monotonic()
    if fleet.first.up is not None:
        fleet.first.up.end()
    fleet.start()
    return at


def _kill_agent(fleet: FaultFleet) -> float:
    name = victim(fleet)
    fleet.kill_device(name)
    at = time.monotonic()
    fleet.attend(name)
    return at


def _kill_supernode(fleet: FaultFleet) -> float:
    fleet.kill_device(victim(fleet))
    return time.monotonic()


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


def _on_link(disturb: Callable[[Network, Link], object]) -> Callable[[FaultFleet], float]:
    def inject(fleet: FaultFleet) -> float:
        network = fleet.first.network
        disturb(network, network.links[victim(fleet)])
        return time.monotonic()

    return inject


def _damage(damage: Damage) -> Callable[[Network, Link], object]:
    return lambda network, link: setattr(link, "damage", damage)


def _partition(fleet: FaultFleet) -> float:
    links = fleet.first.network.links.values()
    for link in links:
        link.refused = True
        fleet.first.network.cut(link)
    time.sleep(LASTS)
    for link in links:
        link.refused = False
    return time.monotonic()


def _disk_runs_full(fleet: FaultFleet) -> float:
    """Not a byte more can be written to the coordinator's state directory, by whomever."""
    fill(fleet.first.folder)
    time.sleep(LASTS)
    empty(fleet.first.folder)
    return time.monotonic()


def _full_disk(fleet: FaultFleet) -> float:
    """No file of the coordinator's processes can grow, of those that are started meanwhile neither."""
    up = fleet.first.up
    if up is None:
        raise AssertionError
    first = {up.process.pid, fleet.first.pid("rounds")}
    _limit_files(first, 0)
    time.sleep(LASTS)
    listed = {each["pid"] for each in (running(fleet.first.folder) or {"services": []})["services"]}
    _limit_files({*first, *children(up.process.pid), *listed} - {None}, resource.RLIM_INFINITY)
    return time.monotonic()


def _full_disk_of_a_device(fleet: FaultFleet) -> float:
    agent, rounds = {fleet.agents[victim(fleet)].process.pid}, len(fleet.records())
    _limit_files(agent, 0)
    wait_until(lambda: len(fleet.records()) > rounds, "a round while a device's disk is full")
    _limit_files(agent, resource.RLIM_INFINITY)
    return time.monotonic()


def _limit_files(processes: Iterable[int], size: int) -> None:
    """Let no file that these processes write be longer, as when a disk is full; the error is another one."""
    for process in processes:
        try:
            _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))
        except ProcessLookupError:  # it has ended meanwhile
            continue


def _with(environment: Callable[[FaultFleet], Mapping[str, str]], *, ends: bool = False) -> Callable[..., float]:
    """Run the victim's agent in another environment for a round, and then again as it was. ``ends``: the agent is
    refused, and ends by itself."""

    def inject(fleet: FaultFleet) -> float:
        name, rounds = victim(fleet), len(fleet.records())
        fleet.agents[name].end()
        fleet.attend(name, environment(fleet))
        changed = fleet.agents[name]
        if ends:
            wait_until(lambda: changed.process.poll() is not None, "the end of an agent that is refused")
        fleet.await_version(rounds, "a round meanwhile")
        changed.end()
        fleet.attend(name)
        return time.monotonic()

    return inject


def _clock(offset: str) -> Callable[[FaultFleet], Mapping[str, str]]:
    return lambda fleet: {"LD_PRELOAD": _faketime(), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def _faketime() -> str:
    return next(map(str, sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), "")


def _no_faketime() -> str:
    return "" if _faketime() else "no libfaketime on this machine (apt install libfaketime)"


def _older(fleet: FaultFleet) -> Mapping[str, str]:
    """Where Python finds an older version of this distribution first."""
    folder = fleet.out / "older" / f"edgeadapt-{OLDER}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: edgeadapt\nVersion: {OLDER}\n", encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}


def _slow(fleet: FaultFleet) -> float:
    links, rounds = fleet.first.network.links.values(), len(fleet.records())
    usual = {id(link): link.delay for link in links}
    for link in links:
        link.delay, link.back = 1.0, 1.0
    wait_until(lambda: len(fleet.records()) > rounds, "a round over a slow network")
    for link in links:
        link.delay, link.back = usual[id(link)], 0.0
    return time.monotonic()


def _kill_leader(fleet: FaultFleet) -> float:
    epoch, machine = fleet.leading()
    machine.kill()
    at = time.monotonic()
    _await_takeover(fleet, epoch)
    machine.start()
    return at


def _kill_leading_machine(fleet: FaultFleet) -> float:
    """The SuperLink's address moves to the machine that takes over."""
    epoch, machine = fleet.leading()
    machine.kill()
    at = time.monotonic()
    _await_takeover(fleet, epoch)
    fleet.lead_supernodes_to(fleet.leading()[1])
    machine.start()
    return at


def _hang_leader(fleet: FaultFleet) -> float:
    """It goes on after the first version that another one has made, and must not have written since."""
    epoch, machine = fleet.leading()
    machine.signal(signal.SIGSTOP)
    at = time.monotonic()
    _await_takeover(fleet, epoch)
    fleet.await_version(len(fleet.records()), "a round under another coordinator")
    machine.signal(signal.SIGCONT)
    return at


def _await_takeover(fleet: FaultFleet, epoch: int) -> None:
    wait_until(lambda: fleet.leading()[0] > epoch, "another coordinator that leads")


def _kill_database(fleet: FaultFleet) -> float:
    fleet.database.kill()
    fleet.database.start()
    return time.monotonic()


def _restart_database(fleet: FaultFleet) -> float:
    fleet.database.stop()
    time.sleep(LASTS)
    fleet.database.start()
    return time.monotonic()


FAULTS = (
    Fault("kill-up", "kill -9 of coordinator up, started again", _kill_up),
    Fault("kill-rounds", "kill -9 of the rounds with their gateway", _send(signal.SIGKILL, "rounds")),
    Fault("kill-agent", "kill -9 of a device's agent, started again", _kill_agent),
    Fault("hang-agent", "a device's agent hangs", _hang_agent, ANSWERS),
    Fault("hang-rounds", "the rounds with their gateway hang", _send(signal.SIGSTOP, "rounds"), ANSWERS),
    Fault("rolling-restart", "stop and start of every process in turn", _rolling_restart, ONE),
    Fault("cut", "a device's connections break", _on_link(Network.cut)),
    Fault("cut-message", "a connection breaks in the middle of an answer", _on_link(_damage(Damage.CUT)), ANSWERS),
    Fault("duplicate", "bytes of a device arrive twice", _on_link(_damage(Damage.DUPLICATE)), ANSWERS),
    Fault("reorder", "bytes of a device arrive after later ones", _on_link(_damage(Damage.REORDER)), ANSWERS),
    Fault("half-open", "only the gateway keeps a connection", _on_link(Network.half_close), ANSWERS),
    Fault("silence", "nothing arrives on connections that stay open", _on_link(Network.silence), ANSWERS),
    Fault("partition", "no device reaches the gateway for some seconds", _partition, ANSWERS),
    Fault("slow", "a second of delay each way, for all devices", _slow, ONE),
    Fault("disk", "no file of the coordinator can grow for some seconds", _full_disk, ANSWERS),
    Fault(
        "disk-full",
        "the disk of the coordinator is full for some seconds",
        _disk_runs_full,
        ANSWERS,
        missing=refused,
        setting=lambda fleet: small_disk(fleet.first.folder),
    ),
    Fault("disk-of-device", "no file of a device can grow for a round", _full_disk_of_a_device, ANSWERS),
    Fault(
        "clock-ahead",
        "a device's clock is 400 days ahead for a round",
        _with(_clock("+400d")),
        ONE,
        missing=_no_faketime,
    ),
    Fault(
        "clock-behind", "a device's clock is a day behind for a round", _with(_clock("-1d")), ONE, missing=_no_faketime
    ),
    Fault("older-version", "a device has too old a version for a round", _with(_older, ends=True), ONE),
    Fault("kill-superlink", "kill -9 of the SuperLink", _send(signal.SIGKILL, "superlink"), ANSWERS, SUPERLINK),
    Fault("hang-superlink", "the SuperLink hangs", _send(signal.SIGSTOP, "superlink"), ONE, SUPERLINK),
    Fault("kill-supernode", "kill -9 of a SuperNode, started again", _kill_supernode, ANSWERS, MIXED),
    Fault(
        "kill-leader",
        "kill -9 of the coordinator that leads; another one waits",
        _kill_leader,
        shape=SHARED,
        missing=missing,
    ),
    Fault(
        "kill-leading-machine",
        "kill -9 of all that serves SuperNodes on the machine that leads; another one waits",
        _kill_leading_machine,
        ONE,
        FleetShape(coordinators=2, superlink=True, supernodes=1),
        missing,
    ),
    Fault("hang-leader", "the coordinator that leads hangs; another one waits", _hang_leader, ONE, SHARED, missing),
    Fault("kill-database", "kill -9 of the database, started again", _kill_database, shape=SHARED, missing=missing),
    Fault("restart-database", "the database is away for some seconds", _restart_database, ANSWERS, SHARED, missing),
)
