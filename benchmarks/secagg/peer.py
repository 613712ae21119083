"""The peer's side of the comparison: the SecAgg+ functions of the installed flwr, called as its client and workflow do.

Its server code needs a running grid. ``sum_up`` and ``unmask`` repeat the two server stages line by line, without the
messages around them; every function that does the work is the peer's own.
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
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
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
Configs = Any  # the type that the peer gives its configurations


@dataclass(frozen=True, slots=True)
class FlowerFleet:
    """Clients that have dealt their shares, in the peer's own Harary graph."""

    states: Mapping[int, SecAggPlusState]
    neighbors: Mapping[int, frozenset[int]]
    sent: Mapping[int, Mapping[int, bytes]]  # receiver → dealer → encrypted shares

    def deal(self, state: SecAggPlusState) -> dict[int, bytes]:
        """Make a client's shares: split both secrets, encrypt them for each neighbor. Its own stay in ``state``."""
        holders = self._holders(state.nid)
        keys: Configs = {str(other): (self.states[other].pk1, self.states[other].pk2) for other in holders}
        answer: Configs = _share_keys(state, keys)
        return dict(zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True))

    def masked(self, client: int, values: Floats) -> list[Any]:
        """Quantize and mask a client's vector: the middle of ``_collect_masked_vectors``, line by line."""
        state, factor = self.states[client], round(RANGE / WEIGHT)
        total: list[Any] = quantize(parameters_multiply([values], factor / RANGE), CLIP, RANGE)
        total = factor_combine(factor, total)
        shapes = get_parameters_shape(total)
        total = parameters_addition(total, pseudo_rand_gen(state.rd_seed, MODULUS, shapes))
        for other in self.neighbors[client]:
            public = bytes_to_public_key(state.public_keys_dict[other][0])
            mask = pseudo_rand_gen(generate_shared_key(bytes_to_private_key(state.sk1), public), MODULUS, shapes)
            total = (parameters_addition if client > other else parameters_subtraction)(total, mask)
        return parameters_mod(total, MODULUS)

    def upload(self, client: int, values: Floats) -> bytes:
        """A client's masked input as it is sent: decrypt its shares, quantize, mask, serialize."""
        return bytes(_collect(self.states[client], self.sent[client], values)[Key.MASKED_PARAMETERS][1])  # 0: weight

    def responses(self, dropouts: frozenset[int]) -> dict[int, list[bytes]]:
        """Owner → shares, as the server receives them from the survivors."""
        found: dict[int, list[bytes]] = {client: [] for client in self.states}
        for client in self.states:
            if client not in dropouts:
                owners = frozenset(self._holders(client))
                configs: Configs = {
                    Key.ACTIVE_NODE_ID_LIST: sorted(owners - dropouts),
                    Key.DEAD_NODE_ID_LIST: sorted(owners & dropouts),
                }
                answer: Configs = _unmask(self.states[client], configs)
                for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
                    found[owner].append(share)
        return found

    def _holders(self, client: int) -> list[int]:
        return sorted((client, *self.neighbors[client]))


def make(clients: int, degree: int, threshold: int) -> FlowerFleet:
    """Make clients with ``degree`` neighbors each, and the encrypted shares of all."""
    states = {client: SecAggPlusState() for client in range(clients)}
    configs: Configs = {
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
    neighbors = {client: frozenset((client + step) % clients for step in steps) for client in states}
    sent: dict[int, dict[int, bytes]] = {client: {} for client in states}
    fleet = FlowerFleet(states, neighbors, sent)
    for dealer in states:
        for receiver, encrypted in fleet.deal(states[dealer]).items():
            sent[receiver][dealer] = encrypted
    # In a round each client decrypts its shares when it masks; here all of them do it now, so that all can unmask.
    for client, encrypted_shares in sent.items():
        _collect(states[client], encrypted_shares, np.zeros(1))
    return fleet


def _collect(state: SecAggPlusState, encrypted_shares: Mapping[int, bytes], values: Floats) -> Configs:
    configs: Configs = {Key.CIPHERTEXT_LIST: list(encrypted_shares.values()), Key.SOURCE_LIST: list(encrypted_shares)}
    return _collect_masked_vectors(state, configs, 1, ndarrays_to_parameters([values]))


def sum_up(uploads: Sequence[bytes]) -> list[Any]:
    """Add masked inputs as the workflow does. The first array stands for the weight."""
    total: list[Any] | None = None
    for upload in uploads:
        vector: list[Any] = [np.ones(1, np.int64), bytes_to_ndarray(upload)]
        total = vector if total is None else parameters_addition(total, vector)
    return parameters_mod(total or [], MODULUS)


def unmask(
    fleet: FlowerFleet, total: list[Any], responses: Mapping[int, list[bytes]], dropouts: frozenset[int]
) -> list[Any]:
    """Subtract the masks and dequantize as the workflow does when it has received the shares."""
    for client, shares in responses.items():
        secret = combine_shares(shares)
        if client not in dropouts:
            mask = pseudo_rand_gen(secret, MODULUS, get_parameters_shape(total))
            total = parameters_subtraction(total, mask)
            continue
        for other in fleet.neighbors[client]:
            public = bytes_to_public_key(fleet.states[other].pk1)
            key = generate_shared_key(bytes_to_private_key(secret), public)
            mask = pseudo_rand_gen(key, MODULUS, get_parameters_shape(total))
            total = (parameters_addition if client > other else parameters_subtraction)(total, mask)
    _, values = factor_extract(parameters_mod(total, MODULUS))
    return dequantize(values, CLIP, RANGE)
