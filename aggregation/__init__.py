"""Secure aggregation: everything that two machines must compute identically.

It depends on numpy and cryptography only, and uses no framework, file, socket, clock or global randomness. The package
itself imports nothing, because every command imports ``aggregation.errors`` and few need the rest. Its modules:

- ``client``, ``server``: the two state machines; ``sealed``: a device's state at rest.
- ``checks``: what a machine requires of a message; ``policy``: what a device requires of an offer.
- ``spec``, ``session``: the parameters and the public state of a session; ``steps``: its exchanges.
- ``messages``, ``envelope``, ``wire``: the messages, their signatures, their canonical encoding.
- ``vector``, ``ring``, ``masks``, ``keystream``: the payload in fixed point, the ring, the masks.
- ``shamir``, ``sharing``, ``recovery``: secret shares, their encryption, the reconstruction of secrets.
- ``graph``: the masking graph. ``pki``: the authority. ``transcript``: the log and the proofs about it.
- ``entropy``: the source of secret bytes; ``singleuse``: a guard; ``errors``: the errors of the project.
"""
