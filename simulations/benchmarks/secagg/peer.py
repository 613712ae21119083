"""The peer's side of the comparison: the SecAgg+ functions of the installed flwr, called as its client and workflow do.

Its server code is bound to a running grid, so the two stages that count are repeated here line by line, without the
messages around them. Every function that does work is the peer's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    generate_shared_key,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from aggregation.vector import Floats

CLIP, RANGE, MODULUS, WEIGHT = 8.0, 2**22, 2**32, 1000.0  # the workflow's defaults
Stage = Any  # the peer types its configurations so


@dataclass(frozen=True, slots=True)
class Fleet:
    """Clients that have dealt their shares, on the peer's own circle."""

    threshold: int
    states: Mapping[int, SecAggPlusState]
    near: Mapping[int, frozenset[int]]
    sent: Mapping[int, Mapping[int, bytes]]  # receiver → dealer → encrypted shares

    def deal(self, state: SecAggPlusState) -> dict[int, bytes]:
        """A client's shares: split both secrets and encrypt them for each neighbour. It keeps its own in ``state``."""
        around = self._around(state.nid)
        keys: Stage = {str(other): (self.states[other].pk1, self.states[other].pk2) for other in around}
        answer: Stage = _share_keys(state, keys)
        return dict(zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True))

    def masked(self, client: int, values: Floats) -> list[Any]:
        """A client's vector, quantized and masked: the middle of ``_collect_masked_vectors``, line by line."""
        state, factor = self.states[client], round(RANGE / WEIGHT)
        total: list[Any] = quantize(parameters_multiply([values], factor / RANGE), CLIP, RANGE)
        total = factor_combine(factor, total)
        shapes = get_parameters_shape(total)
        total = parameters_addition(total, pseudo_rand_gen(state.rd_seed, MODULUS, shapes))
        for other in self.near[client]:
            public = bytes_to_public_key(state.public_keys_dict[other][0])
            mask = pseudo_rand_gen(generate_shared_key(bytes_to_private_key(state.sk1), public), MODULUS, shapes)
            total = (parameters_addition if client > other else parameters_subtraction)(total, mask)
        return parameters_mod(total, MODULUS)

    def upload(self, client: int, values: Floats) -> bytes:
        """A client's masked input, ready to be sent: decrypt its shares, quantize, mask, serialize."""
        encrypted_shares = self.sent[client]
        configs: Stage = {Key.CIPHERTEXT_LIST: list(encrypted_shares.values()), Key.SOURCE_LIST: list(encrypted_shares)}
        answer: Stage = _collect_masked_vectors(self.states[client], configs, 1, ndarrays_to_parameters([values]))
        return bytes(answer[Key.MASKED_PARAMETERS][1])  # 0 is the weight

    def responses(self, gone: frozenset[int]) -> dict[int, list[bytes]]:
        """Owner → shares, as the server collects them from the survivors."""
        found: dict[int, list[bytes]] = {client: [] for client in self.states}
        for client in self.states:
            if client not in gone:
                around = frozenset(self._around(client))
                configs: Stage = {
                    Key.ACTIVE_NODE_ID_LIST: sorted(around - gone),
                    Key.DEAD_NODE_ID_LIST: sorted(around & gone),
                }
                answer: Stage = _unmask(self.states[client], configs)
                for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
                    found[owner].append(share)
        return found

    def _around(self, client: int) -> list[int]:
        return sorted((client, *self.near[client]))


def make(clients: int, degree: int, threshold: int) -> Fleet:
    """Clients with ``degree`` neighbours each, and everybody's encrypted shares."""
    states = {client: SecAggPlusState() for client in range(clients)}
    configs: Stage = {
        Key.SAMPLE_NUMBER: clients,
        Key.SHARE_NUMBER: degree + 1,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: RANGE,
        Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: WEIGHT,
    }
    for client, state in states.items():
        state.nid = client
        _setup(state, configs)
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    near = {client: frozenset((client + step) % clients for step in steps) for client in states}
    fleet = Fleet(threshold, states, near, {})
    sent: dict[int, dict[int, bytes]] = {client: {} for client in states}
    for dealer in states:
        for receiver, box in fleet.deal(states[dealer]).items():
            sent[receiver][dealer] = box
    # Shares arrive with the plan; here for all at once, so that everyone can open.
    for client, encrypted_shares in sent.items():
        _receive(states[client], encrypted_shares)
    return Fleet(threshold, states, near, sent)


def _receive(state: SecAggPlusState, encrypted_shares: Mapping[int, bytes]) -> None:
    configs: Stage = {Key.CIPHERTEXT_LIST: list(encrypted_shares.values()), Key.SOURCE_LIST: list(encrypted_shares)}
    _collect_masked_vectors(state, configs, 1, ndarrays_to_parameters([np.zeros(1)]))


def lost(fleet: Fleet, fraction: float) -> frozenset[int]:
    """So many clients, spread evenly over the circle."""
    clients, count = len(fleet.states), round(fraction * len(fleet.states))
    return frozenset(i * clients // count for i in range(count)) if count else frozenset()


def sum_up(uploads: Sequence[bytes]) -> list[Any]:
    """What the workflow does when masked inputs have come. One element stands for the weight."""
    total: list[Any] | None = None
    for upload in uploads:
        vector: list[Any] = [np.ones(1, np.int64), bytes_to_ndarray(upload)]
        total = vector if total is None else parameters_addition(total, vector)
    return parameters_mod(total or [], MODULUS)


def unmask(fleet: Fleet, total: list[Any], responses: Mapping[int, list[bytes]], gone: frozenset[int]) -> list[Any]:
    """What the workflow does when shares have come."""
    for client, shares in responses.items():
        secret = combine_shares(shares)
        if client not in gone:
            mask = pseudo_rand_gen(secret, MODULUS, get_parameters_shape(total))
            total = parameters_subtraction(total, mask)
            continue
        for other in fleet.near[client]:
            public = bytes_to_public_key(fleet.states[other].pk1)
            key = generate_shared_key(bytes_to_private_key(secret), public)
            mask = pseudo_rand_gen(key, MODULUS, get_parameters_shape(total))
            total = (parameters_addition if client > other else parameters_subtraction)(total, mask)
    _, values = factor_extract(parameters_mod(total, MODULUS))
    return dequantize(values, CLIP, RANGE)
