"""The settings of what ``edgeadapt coordinator up`` runs on this machine, ``services.toml``."""

import re
from ipaddress import ip_address
from itertools import combinations
from typing import Self

from pydantic import Field, model_validator

from coordinator.settings import ADDRESS
from edgeadapt.formats.settings import Settings

SERVICES = "services.toml"  # in the coordinator's state directory


def is_address(text: str) -> bool:
    """Whether ``text`` is HOST:PORT with a port from 1 to 65535.

    >>> is_address("127.0.0.1:9443"), is_address("[::1]:9443"), is_address("localhost"), is_address("host:0")
    (True, True, False, False)
    """
    return bool(re.fullmatch(ADDRESS, text)) and 0 < int(text.rpartition(":")[2]) < 2**16


def is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServiceSettings(Settings):
    """``services.toml`` in the coordinator's state directory."""

    gateway: str = Field(
        default="", description="HOST:PORT at which light devices are served; a device must reach it; empty: none are"
    )
    superlink: str = Field(
        default="", description="HOST:PORT at which Flower's SuperLink listens for SuperNodes; empty: it is not run"
    )
    dashboard: str = Field(
        default="",
        description="HOST:PORT of the page for the operator, with TLS unless it is 127.0.0.1; empty: no page",
    )
    channels: str = Field(
        default="", description="folder of a repository of channels, which the dashboard shows; empty: none"
    )
    ready: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="time in which a service must be ready, in seconds; then it is restarted",
    )
    stop: float = Field(
        default=30.0, gt=0, le=3600, description="time that a service has to stop, in seconds; then it is killed"
    )
    pause: float = Field(
        default=60.0,
        ge=1,
        le=3600,
        description="longest pause before a service that ended is started again, in seconds; pauses double from 1 s",
    )
    look: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="time between two looks whether a service that was ready still answers, in seconds",
    )
    failures: int = Field(
        default=3,
        ge=1,
        le=1000,
        description="looks in a row that a service leaves without an answer before it is killed and started again",
    )

    @model_validator(mode="after")
    def _has_places_to_listen(self) -> Self:
        places = {"gateway": self.gateway, "superlink": self.superlink, "dashboard": self.dashboard}
        for key, address in places.items():
            if address and not is_address(address):
                raise ValueError(f"{key} is {address!r}, and not HOST:PORT with a port from 1 to 65535")
        for (first, there), (other, same) in combinations(places.items(), 2):
            if there and there == same:
                raise ValueError(f"{first} and {other} cannot both listen at {there}")
        return self
