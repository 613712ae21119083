"""A real PostgreSQL server of the test's own; without the program a test is skipped."""

import os
from typing import Self

from benchmarks.faults import postgresql
from tests.support.programs import need

REQUIRED = os.environ.get("EDGEADAPT_REQUIRE_POSTGRESQL") == "1"


class Server(postgresql.PostgresServer):
    """A server that skips the test where this machine has no program for it."""

    @classmethod
    def create(cls) -> Self:
        need(postgresql.programs(), "no PostgreSQL server: apt install postgresql", required=REQUIRED)
        return super().create()
