"""Canonical bytes: one byte string for one value, and one value for one byte string.

A ``Codec`` writes and reads one type; a record is declared once, field by field, and that declaration serves
both directions. Integers are big-endian. Sizes are checked against the limit *and* against the bytes that are
there before anything is allocated. Reading arbitrary bytes ends in a value or in ``ProtocolError``, never in
another error; bytes left over are refused.

What the fields mean is decided in ``messages``; who signed them, in ``envelope``.
"""

from aggregation.wire.codec import Codec
from aggregation.wire.compounds import mapping, optional, record, sequence
from aggregation.wire.values import blob, choice, fixed, real, text, uint

__all__ = ["Codec", "blob", "choice", "fixed", "mapping", "optional", "real", "record", "sequence", "text", "uint"]
