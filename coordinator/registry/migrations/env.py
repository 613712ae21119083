"""Alembic runs this file for each of its commands (alembic.sqlalchemy.org, "Sharing a connection")."""

from alembic import context

from coordinator.registry import database
from edgeadapt.formats.registryfiles import SCHEMAS

context.configure(
    connection=context.config.attributes["connection"], target_metadata=database.metadata, version_table=SCHEMAS
)
context.run_migrations()
