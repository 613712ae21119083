"""The lease of a leader, and the transcript, for coordinators that take over from each other."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "3", "2"


def upgrade() -> None:
    op.create_table(
        "edgeadapt_lease",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("leader", sa.Text, nullable=False),
        sa.Column("ends", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "edgeadapt_transcript",
        sa.Column("session", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("records", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "edgeadapt_revocations",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("pem", sa.LargeBinary, nullable=False),
    )
