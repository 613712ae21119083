"""Move the fleet of a run to the base of another scenario, on the in-process grid.

The run's clients, coordinator and devices stay. The other scenario gives the base, its adapter and how it is trained.
Every device has both bases.
"""

from collections.abc import Callable

from flwr.clientapp import ClientApp

from aggregation.errors import ConfigError
from client.node.app import register
from coordinator.migration import MigrationResult, MigrationRound, Target, conclude, migrate
from coordinator.transport import SERVER_NODE
from edgeadapt.formats.storage import kill_safe
from simulations.data import populate
from simulations.engine import provision
from simulations.engine.devices import MemoryDevices
from simulations.engine.grid import InProcessGrid
from simulations.engine.plain import is_plain, open_coordinator
from simulations.scenario import Scenario
from simulations.suite.run import RunFolder, faults_of

NEXT = "next"  # folder of the next base, in that of the run


def migrate_run(
    folder: RunFolder, to: Scenario, rounds: int, margin: float, report: Callable[[MigrationRound], object]
) -> MigrationResult:
    """Migrate the fleet of a run, or go on with that. ``report`` gets each round once it is committed.

    Raises ConfigError: the run has several federations, or the base or its adapter is not for its texts; or as
    ``coordinator.migration.migrate``.
    """
    if folder.scenario.groups.by != "none":
        raise ConfigError("a migration is of one federation, and the run has groups", about="groups.by")
    stored = folder.scenario
    population, scenario = populate(stored.data, stored.population, stored.seed).population, _next(stored, to)
    first, place = provision.training_base(folder.path, stored, population), folder.path / NEXT
    place.mkdir(exist_ok=True)
    base = provision.training_base(place, scenario, population)
    old = provision.device_base(folder.path, stored, first, population)
    new = provision.device_base(place, scenario, base, population)
    leading = open_coordinator(coordinator := folder.path / provision.COORDINATOR)
    settings = leading.settings.model_copy(update={"training": to.federation.training})
    target = Target(*provision.first_adapter(scenario, population, base), settings, rounds, margin)
    enrolment = provision.Enrolment.of(folder.path, stored, population, first)
    devices = MemoryDevices(enrolment.state_dir, old, is_plain(coordinator), new)
    nodes = {n: each.name for n, each in enumerate(population.clients, SERVER_NODE + 1) if not each.unseen}
    register(app := ClientApp(), devices.open)
    with kill_safe(), leading.leading() as leader:
        done = len(leader.registry.rounds())  # other faults than those of the rounds before
        grid = InProcessGrid(app, nodes, faults_of(stored, {}, done), devices.before)
        for each in migrate(leader, grid, target):
            report(each)
        devices.write()
        return conclude(leader, target)


def _next(scenario: Scenario, to: Scenario) -> Scenario:
    federation = scenario.federation.model_copy(update={"training": to.federation.training})
    return scenario.model_copy(update={"base": to.base, "adapter": to.adapter, "federation": federation})
