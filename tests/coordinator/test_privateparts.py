"""A coordinator that begins rounds which its devices would refuse, because they keep a part to themselves."""

from aggregation.errors import ConfigError
from edgeadapt.methods.parts import Part
from tests.support import FleetOf, refused

DEVICES = 4


def test_a_method_that_shares_what_devices_keep_to_themselves_is_refused_before_they_are_asked(
    fleet_of: FleetOf,
) -> None:
    fleet = fleet_of(DEVICES, rounds=1, method="fedsa", aggregation__session_rounds=1)
    fleet.federate(fleet.grid())
    fleet.configure({"method": "head", "rounds": 2})  # shares another part, in a log of its own
    fleet.federate(fleet.grid())
    for method in ("fedit", "fedsb", "fedper"):
        fleet.configure({"method": method, "rounds": 3})
        with refused(ConfigError, "method", value=Part.B):
            fleet.federate(None)
    fleet.configure({"method": "fedsa", "rounds": 3})
    fleet.federate(fleet.grid())
    fleet.configure({"method": "fedit", "rounds": 4, "analytic.rounds": 1})  # nothing is left to train
    assert [record.version for record in fleet.federate(fleet.grid())] == [1, 2, 3, 4]
