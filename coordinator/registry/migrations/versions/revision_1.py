"""Versions, rounds, the state of the optimizer, and the number of the format."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "1", None


def upgrade() -> None:
    op.create_table("edgeadapt_format", sa.Column("format", sa.Integer, primary_key=True))
    op.create_table(
        "edgeadapt_versions",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("manifest", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "edgeadapt_rounds",
        sa.Column("round", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "edgeadapt_optimizer",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("tensors", sa.LargeBinary, nullable=False),
    )
