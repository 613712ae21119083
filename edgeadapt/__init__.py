"""Federated on-device personalization of frozen models.

::

    model = edgeadapt.load("phone/bundle")                  # verified: signatures, digests, no older version
    print(model("turn on the kitchen lights"))              # HassTurnOn 94 %
    model.teach("it is too dark in here", "HassTurnOn")     # on this device, at once
    model.undo()

    run = edgeadapt.simulate("tickets.csv", client="customer")   # each alone, and all together
    print(run)
    assert edgeadapt.audit(run.path)                        # did the server add up what the devices sent?

Each name is loaded when it is used: the bare install has neither torch nor Flower."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aggregation.errors import ConfigError, DataError, EdgeAdaptError, ProtocolError, TrustError
    from edgeadapt.interface.audits import Audit, audit
    from edgeadapt.interface.coordinators import Coordinator
    from edgeadapt.interface.devices import Device
    from edgeadapt.interface.exports import export
    from edgeadapt.interface.models import Answer, Classifier, LanguageModel, load
    from edgeadapt.interface.runs import Run, simulate, suite
    from simulations.suite.execute import SuiteReport

_HOMES = {
    "aggregation.errors": ("ConfigError", "DataError", "EdgeAdaptError", "ProtocolError", "TrustError"),
    "edgeadapt.interface.audits": ("Audit", "audit"),
    "edgeadapt.interface.coordinators": ("Coordinator",),
    "edgeadapt.interface.devices": ("Device",),
    "edgeadapt.interface.exports": ("export",),
    "edgeadapt.interface.models": ("Answer", "Classifier", "LanguageModel", "load"),
    "edgeadapt.interface.runs": ("Run", "simulate", "suite"),
    "simulations.suite.execute": ("SuiteReport",),
}
_EXTRAS = {  # what the bare install lacks for them
    "edgeadapt.interface.coordinators": "coordinator",
    "edgeadapt.interface.devices": "gateway",
    "edgeadapt.interface.exports": "export",
    "edgeadapt.interface.runs": "simulations",
    "simulations.suite.execute": "simulations",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "Audit",
    "Classifier",
    "ConfigError",
    "Coordinator",
    "DataError",
    "Device",
    "EdgeAdaptError",
    "LanguageModel",
    "ProtocolError",
    "Run",
    "SuiteReport",
    "TrustError",
    "__version__",
    "audit",
    "export",
    "load",
    "simulate",
    "suite",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("edgeadapt")
    if name in _HOME_OF:
        home = _HOME_OF[name]
        try:
            return getattr(import_module(home), name)
        except ModuleNotFoundError as error:
            if home not in _EXTRAS:
                raise
            remedy = f"which is not installed: pip install 'edgeadapt[{_EXTRAS[home]}]'"
            raise ImportError(f"edgeadapt.{name} needs {error.name}, {remedy}", name=error.name) from error
    raise AttributeError(f"module 'edgeadapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
