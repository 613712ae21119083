"""The device's side, as other parts import it: ``device`` holds the states, ``sealed`` stores them."""

from aggregation.device import Advertised, ClientState, Confirmed, Device, Masked, Planned, Ready, join
from aggregation.sealed import seal, unseal

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
