"""The revision is in alembic's table, and no longer in one of the registry."""

from alembic import op

revision, down_revision = "2", "1"


def upgrade() -> None:
    op.drop_table("edgeadapt_format")
