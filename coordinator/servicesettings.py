"""The settings of what ``edgeadapt coordinator up`` runs on this machine, ``services.toml``."""

import re
from typing import Self

from pydantic import Field, model_validator

from adapters.settings import Settings

SERVICES = "services.toml"  # in the coordinator's state directory
ADDRESS = r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}"


class ServiceSettings(Settings):
    """``services.toml`` in the coordinator's state directory."""

    gateway: str = Field(
        default="", description="HOST:PORT at which light devices are served; a device must reach it; empty: none are"
    )
    superlink: str = Field(
        default="", description="HOST:PORT at which Flower's SuperLink listens for SuperNodes; empty: it is not run"
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
        for key, address in (("gateway", self.gateway), ("superlink", self.superlink)):
            if address and (not re.fullmatch(ADDRESS, address) or not 0 < int(address.rpartition(":")[2]) < 2**16):
                raise ValueError(f"{key} is {address!r}, and not HOST:PORT with a port from 1 to 65535")
        if self.gateway and self.gateway == self.superlink:
            raise ValueError(f"gateway and superlink cannot both listen at {self.gateway}")
        return self
