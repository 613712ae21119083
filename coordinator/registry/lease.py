"""Who of several coordinators with one registry leads: a lease with an epoch (docs/decisions/0074).

The lease is a row of the database, in PostgreSQL only; a registry in SQLite has one machine, and the lock of its state
directory. A coordinator that finds the lease over adds one to the epoch and leads. Every transaction of a run locks the
row and compares the epoch (``fenced``, Kleppmann's fencing token), so a leader that was paused while another one took
over commits nothing. The only clock is the server's."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.dialects.postgresql import insert

from aggregation.errors import EdgeAdaptError
from coordinator.registry import database

TERM = timedelta(seconds=10)  # a lease ends after that unless it is renewed
RENEWAL = 2.0  # seconds between two renewals
LOOK = 1.0  # seconds between two polls of who leads
IDLE = 5000  # milliseconds that a transaction with the lease's row may wait for its next statement
LOCKED = 3000  # milliseconds that a statement waits for a lock that another coordinator holds
LEASE = "lease"  # what an error is about if another coordinator leads
log = logging.getLogger("edgeadapt.coordinator")


@dataclass(frozen=True, slots=True)
class Leadership:
    """``in_force``: the lease has not ended."""

    epoch: int
    leader: str
    in_force: bool


def leadership(engine: Engine) -> Leadership | None:
    """Read who leads; None if nobody ever did. Raises as ``database.explained``."""
    table = database.lease
    query = select(table.c.epoch, table.c.leader, table.c.ends > _now(engine))
    with database.explained(engine), engine.connect() as connection:
        row = connection.execute(query).one_or_none()
    return None if row is None else Leadership(*row)


def require_epoch(connection: Connection, epoch: int | None) -> None:
    """Check that the writer of a transaction still leads, and keep any other from leading until the transaction ends.
    ``epoch``: of the writer's lease; None: it does not have one, which is enough until somebody leads. Raises
    EdgeAdaptError: another one leads."""
    table = database.lease
    _end_when_idle(connection)
    leader = connection.execute(select(table.c.epoch, table.c.leader).with_for_update()).one_or_none()
    if (leader and leader.epoch) != epoch:
        raise _superseded(epoch, leader and leader.epoch, leader and leader.leader)


@contextmanager
def fenced(engine: Engine, epoch: int | None) -> Iterator[Connection]:
    """Begin a transaction of a writer that leads. The lease lasts from its end on: its row lock delays renewals."""
    with database.explained(engine), engine.begin() as connection:
        require_epoch(connection, epoch)
        yield connection
        if epoch is not None:
            connection.execute(database.lease.update().values(ends=func.clock_timestamp() + TERM))


@dataclass(slots=True)
class Lease:
    engine: Engine
    leader: str
    epoch: int
    _lost: EdgeAdaptError | None = field(default=None, repr=False)

    @classmethod
    def take(cls, engine: Engine, leader: str) -> "Lease | Leadership":
        """Lead, unless another lease is in force; ``leader`` is for people. Raises EdgeAdaptError: as
        ``database.explained``, also if another coordinator holds the row for too long."""
        current = leadership(engine)
        if current is not None and current.in_force:
            return current
        table, epoch = database.lease, current.epoch + 1 if current else 1
        values = {"epoch": epoch, "leader": leader, "ends": func.clock_timestamp() + TERM}
        free = (table.c.epoch == epoch - 1) & (table.c.ends <= func.clock_timestamp())
        change = table.update().where(free).values(values).returning(table.c.epoch)
        first = insert(table).values(id=database.ONLY_ROW, **values).on_conflict_do_nothing().returning(table.c.epoch)
        with database.explained(engine), engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCKED}")
            _end_when_idle(connection)
            taken = connection.execute(change if current else first).one_or_none() is not None
        # Otherwise another one was faster, or the leader has just ended a transaction that took long.
        return cls(engine, leader, epoch) if taken else cls.take(engine, leader)

    def require(self) -> None:
        """Check that no renewal has found another leader. Raises EdgeAdaptError."""
        if self._lost is not None:
            raise self._lost

    @contextmanager
    def kept(self, renewed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Renew the lease while the block runs, and end it after that. ``renewed`` is called after each renewal."""
        done = threading.Event()
        renewing = threading.Thread(target=self._renew_until, args=(done, renewed), name="lease", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()
            self._end()

    def _renew_until(self, done: threading.Event, renewed: Callable[[], None]) -> None:
        reachable = True
        while not done.wait(RENEWAL):
            try:
                self.renew()
            except EdgeAdaptError as error:
                if self._lost is not None:
                    return
                if reachable:
                    log.warning("the lease is not renewed: %s", error)
                reachable = False
            else:
                reachable = True
                renewed()

    def renew(self) -> None:
        """Let the lease last from now on. Raises EdgeAdaptError: another one leads, or as ``database.explained``."""
        try:
            self._set_end(func.clock_timestamp() + TERM)
        except EdgeAdaptError as error:
            self._lost = error if error.about == LEASE else self._lost
            raise

    def _end(self) -> None:
        """Let another coordinator lead at once. What fails here ends by itself."""
        if self._lost is None:
            try:
                self._set_end(func.clock_timestamp())
            except EdgeAdaptError as error:
                log.warning("the lease ends within %d s: %s", TERM.total_seconds(), error)

    def _set_end(self, ends: object) -> None:
        table = database.lease
        with database.explained(self.engine), self.engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCKED}")
            require_epoch(connection, self.epoch)
            connection.execute(table.update().values(ends=ends))


def _end_when_idle(connection: Connection) -> None:
    # A coordinator that stops within a transaction would keep the row, which another one needs to take over. Readers
    # hold nothing, and a slow machine must not end their transactions.
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {IDLE}")


def _superseded(epoch: int | None, found: int | None, leader: str | None) -> EdgeAdaptError:
    if epoch is None:
        text = f"{leader} leads, epoch {found}, or did last: only a coordinator that leads writes to this registry"
    else:
        text = f"this coordinator led in epoch {epoch}, and {leader or 'nobody'} has taken over"
        text += f" in epoch {found}: nothing was changed, and this run ends" if found else ": this run ends"
    return EdgeAdaptError(text, about=LEASE)


def _now(engine: Engine) -> object:
    return func.clock_timestamp() if engine.dialect.name == "postgresql" else func.current_timestamp()
