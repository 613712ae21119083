"""The transcript of a session: an append-only log of its signed messages, which an outsider can check later.

An entry holds a message as it travelled, with its place: index, kind, round and peer. Of a masked input the log holds
the signed header, which names the vector by digest; vectors are kept outside the log, or not at all. Of the assignments
of a round that carry encrypted shares, the first is kept complete, the others without their body: their plan is that of
the first, and their shares are in the messages of the dealers (``edgeadapt.auditing.history`` restores them).

The entries are the leaves of a Merkle tree (``merkle``). The coordinator signs its root in *checkpoints*, which are
entries too: one when the session is established, one after each round, and one that closes the log, so that a truncated
log is recognizable.

The log holds no secret: it contains what the coordinator knows anyway, and nothing about a single device's update. It
does contain who took part. This package opens no file: the caller stores the records that it returns."""
