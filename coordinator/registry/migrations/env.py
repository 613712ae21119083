"""Alembic runs this file for each of its commands (alembic.sqlalchemy.org, "Sharing a connection")."""

from alembic import context

from adapters.registryfiles import SCHEMAS
from coordinator.registry import database

context.configure(
    connection=context.config.attributes["connection"], target_metadata=database.metadata, version_table=SCHEMAS
)
context.run_migrations()
