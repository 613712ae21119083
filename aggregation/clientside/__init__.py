"""The device's side of the protocol: one frozen type a state, whose methods are the legal steps.

    join → Advertised → Ready → Planned → Masked → Confirmed → Ready …
                                          Masked ───────────→ Ready …      (honest-but-curious)

Each step checks the message (``checks``), then returns the next state and the answer. A refused message raises
``ProtocolError`` and leaves the state as it was. A state answers once: a second answer from the same state is
refused, because two answers to one step are what attacks are made of. A new plan may come in any state from
``Ready`` on; what was secret of the abandoned round is then gone.

A device that must survive a restart seals the new state (``sealed``) *before* it sends the answer.
"""

from aggregation.clientside.device import Device
from aggregation.clientside.joining import Advertised, join
from aggregation.clientside.masked import Confirmed, Masked
from aggregation.clientside.planned import Planned
from aggregation.clientside.ready import Ready
from aggregation.clientside.sealed import ClientState, seal, unseal

__all__ = [
    "Advertised",
    "ClientState",
    "Confirmed",
    "Device",
    "Masked",
    "Planned",
    "Ready",
    "join",
    "seal",
    "unseal",
]
