"""A population from rows of labelled texts: clients, splits, public texts, and what was left out on the way.

No group of near-duplicates (``groups.py``) is on both sides of a split, whichever clients have its texts: a group is
for tests or it is not, for everyone. Only a column ``split`` of the data is kept as it is.
"""

import hashlib
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasketch import MinHash, MinHashLSH

from aggregation.errors import ConfigError, DataError
from aggregation.pki.certificates import is_device_id
from client.training.examples import NO_LABEL
from simulations.data.population import Client, LabelledText, Population
from simulations.data.tables.rows import DataSettings, Row, Rows, read_public, read_rows

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner
SHINGLE = 3  # characters
PERMUTATIONS = 64
_NUMBERS, _REST = re.compile(r"\d+"), re.compile(r"[\W_]+")
FEWEST_TRAINED = 3  # clients that take part: what a secure sum needs
TEST, TRAIN, VALIDATION = "test", "train", "validation"


def partition(labels: Sequence[str], settings: DataSettings, seed: int) -> list[int]:
    """The client of each row, from 0; a client may get no row. The same rows, settings and seed give the same clients.

    Raises:
        ConfigError: So many clients cannot be made from these rows by this rule.
    """
    from datasets import Dataset

    order = np.random.default_rng(seed).permutation(len(labels))
    rule = _partitioner(settings, seed)
    owner = [0] * len(labels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each attempt at a Dirichlet draw
            rule.dataset = Dataset.from_dict({"row": order.tolist(), "label": [labels[row] for row in order]})
            for client in range(settings.clients):
                for row in rule.load_partition(client)["row"]:
                    owner[row] = client
    except ValueError as error:
        reason = f"{len(labels)} texts cannot be dealt out to {settings.clients} clients by {settings.partition}"
        raise ConfigError(f"{reason}: {' '.join(str(error).split())[:200]}", about="data.partition") from error
    return owner


def _partitioner(settings: DataSettings, seed: int) -> "Partitioner":
    from flwr_datasets import partitioner as rules

    count = settings.clients
    match settings.partition:
        case "iid":
            return rules.IidPartitioner(count)
        case "dirichlet":
            return rules.DirichletPartitioner(count, "label", settings.concentration, min_partition_size=0, seed=seed)
        case "shard":
            return rules.ShardPartitioner(count, "label", num_shards_per_partition=settings.shards, seed=seed)
        case "linear":
            return rules.LinearPartitioner(count)
        case "exponential":
            return rules.ExponentialPartitioner(count)


def normalized(text: str) -> str:
    """What two near-duplicates share: no case, punctuation or white space, and every number as 0.

    >>> normalized("Turn it to 21 °C,  please!")
    'turn it to 0 c please'
    """
    return _REST.sub(" ", _NUMBERS.sub("0", text.casefold())).strip()


def group_texts(texts: Sequence[str], keys: Sequence[str], threshold: float) -> list[int]:
    """The group of each text, as the index of the group's first text.

    Texts whose sets of three-character pieces have a Jaccard index of at least ``threshold`` are in one group, and so
    are those that a chain of such pairs connects. The index is estimated from 64 hashes (Broder 1997; its standard
    deviation is at most 0.0625) for pairs that locality-sensitive hashing finds (Indyk and Motwani 1998).

    Args:
        keys: One for each text; those with the same key that is not empty belong together too.
        threshold: From 0.3 to 1; at 1, only texts that ``normalized`` makes equal are in one group.
    """
    first: dict[str, int] = {}
    parent = list(range(len(texts)))
    for index, text in enumerate(texts):
        parent[index] = first.setdefault(normalized(text), index)
    if threshold < 1:
        _join_similar(list(first.items()), parent, threshold)
    keyed: dict[str, int] = {}
    for index, key in enumerate(keys):
        if key:
            _join(parent, keyed.setdefault(key, index), index)
    return [_root(parent, index) for index in range(len(texts))]


def _join_similar(distinct: Sequence[tuple[str, int]], parent: list[int], threshold: float) -> None:
    rows = (
        4 if threshold >= 0.7 else 2
    )  # of a band: a pair at the threshold is found with a probability of 0.95 or more
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
    sketches: dict[int, MinHash] = {}
    for text, number in distinct:
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(sorted({text[i : i + SHINGLE].encode() for i in range(max(1, len(text) - SHINGLE + 1))}))
        for other in index.query(sketch):
            if sketches[other].jaccard(sketch) >= threshold:
                _join(parent, other, number)
        sketches[number] = sketch
        index.insert(number, sketch)


def _join(parent: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(parent, one), _root(parent, other)))
    parent[high] = low


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What became of the rows.

    Attributes:
        small: Clients that were left out, because they had fewer than ``minimum_texts`` or nothing to train or test on.
    """

    rows: int  # rows that are used, broken ones not counted
    broken: tuple[str, ...]  # a line for each broken row
    groups: int  # groups of near-duplicates among the rows
    small: int
    overlapping: int  # test texts that were left out, because a near-duplicate is in somebody's training part
    leaked: int  # test texts of the data's own split of which a near-duplicate is in somebody's training part


@dataclass(frozen=True, slots=True)
class Loaded:
    """A population and where it came from."""

    population: Population
    facts: DataFacts | None  # None if no rows were read


def load_population(settings: DataSettings, seed: int) -> Loaded:
    """Read the texts and make a population of them; the same texts, settings and seed give the same ``digest``.

    Raises:
        ConfigError, DataError: As ``read_rows``; there are too few clients, labels or texts; or no row can be used, or
            one is broken and ``settings.broken`` refuses it.
    """
    rows, public = read_rows(settings), read_public(settings)
    broken = rows.broken + public.broken
    if not rows.good:
        why = f"none of the {len(broken)} rows can be used; {broken[0]}" if broken else "there are no rows of texts"
        raise DataError(why, about="data.files", value=broken)
    if broken and settings.broken == "refuse":
        more = f" (and {len(broken) - 1} more rows)" if len(broken) > 1 else ""
        raise DataError(
            f"{broken[0]}{more}; mend it, or leave such rows out with data.broken = skip",
            about="data.files",
            value=broken,
        )
    return _Maker(settings, seed, rows, public).make(broken)


class _Maker:
    """The steps from rows to clients, in order; each reads what those before it left."""

    def __init__(self, settings: DataSettings, seed: int, rows: Rows, public: Rows) -> None:
        self.settings, self.seed = settings, seed
        self.rows, given = self._sampled(rows.good), public.good
        found = {row.label for row in (*self.rows, *given)}
        self.labels = tuple(sorted(found)) if settings.label else ()
        if settings.label and len(self.labels) < 2:
            raise ConfigError(
                f"the {len(self.rows)} texts have {len(self.labels)} different labels; at least 2 are needed",
                about="data.label",
                value=settings.label,
            )
        texts = [row.text for row in (*self.rows, *given)]
        keys = [row.group for row in (*self.rows, *given)]
        self.groups = group_texts(texts, keys, settings.near_duplicates)
        self.number = {label: index for index, label in enumerate(self.labels)} or {"": NO_LABEL}
        self.public_groups = set(self.groups[len(self.rows) :])
        self.public = [self._labelled(row, self.groups[len(self.rows) + at]) for at, row in enumerate(given)]

    def _sampled(self, rows: Sequence[Row]) -> list[Row]:
        """At most ``settings.sample`` of the rows, in their order."""
        if not 0 < self.settings.sample < len(rows):
            return list(rows)
        drawn = np.random.default_rng(self.seed).choice(len(rows), self.settings.sample, replace=False)
        return [rows[at] for at in sorted(drawn)]

    def make(self, broken: tuple[str, ...]) -> Loaded:
        """All steps."""
        taken = set() if self.public else self._take_public()
        left = [at for at in range(len(self.rows)) if at not in taken]
        owned, small = self._owned(left)
        side = self._sides(owned)
        leaked = overlapping = 0
        if self.settings.split or self.settings.holdout == "time":
            learned = {self.groups[at] for at, part in side.items() if part != TEST} | self.public_groups
            repeated = [at for at, part in side.items() if part == TEST and self.groups[at] in learned]
            if self.settings.split:
                leaked = len(repeated)
            else:
                overlapping = len(repeated)
                side = {at: part for at, part in side.items() if at not in set(repeated)}
        clients = []
        for name, members in owned.items():
            client = self._client(name, members, side)
            if client is None:
                small += 1
            else:
                clients.append(client)
        facts = DataFacts(len(self.rows), broken, len(set(self.groups)), small, overlapping, leaked)
        return Loaded(Population(self.labels, tuple(self.public), self._named(clients)), facts)

    def _hash(self, *parts: object) -> int:
        return int.from_bytes(hashlib.sha256("\x1f".join(map(str, (self.seed, *parts))).encode()).digest()[:8], "big")

    def _order(self, group: int) -> int:
        """The place of a group in the order that decides its use; of its first text, whatever the machine."""
        first = self.rows[group].text if group < len(self.rows) else self.public[group - len(self.rows)].text
        return self._hash("group", first)

    def _labelled(self, row: Row, group: int) -> LabelledText:
        return LabelledText(row.text, self.number[row.label], f"g{group}", row.prompt)

    def _take_public(self) -> set[int]:
        """Make some texts of each label public, and return all texts of their groups, which no client keeps."""
        members: dict[int, list[int]] = defaultdict(list)
        for at in range(len(self.rows)):
            if self.rows[at].split in ("", TRAIN):
                members[self.groups[at]].append(at)
        order = sorted(members, key=lambda group: (len(members[group]), self._order(group)))
        count: Counter[str] = Counter()
        for group in order:
            first = self.rows[members[group][0]]
            if count[first.label] < self.settings.public_texts:
                count[first.label] += 1
                self.public_groups.add(group)
                self.public.append(self._labelled(first, group))
        self.public.sort(key=lambda text: text.label)
        return {at for at in range(len(self.rows)) if self.groups[at] in self.public_groups}

    def _owned(self, left: Sequence[int]) -> tuple[dict[str, list[int]], int]:
        """Client → its rows; and how many clients had too few."""
        if self.settings.client:
            names = [self.rows[at].client for at in left]
        else:
            owner = partition([self.rows[at].label for at in left], self.settings, self.seed)
            names = [f"client-{number + 1:04d}" for number in owner]
        owned: dict[str, list[int]] = defaultdict(list)
        for name, at in zip(names, left, strict=True):
            owned[name].append(at)
        enough = {name: owned[name] for name in sorted(owned) if len(owned[name]) >= self.settings.minimum_texts}
        return enough, len(owned) - len(enough)

    def _sides(self, owned: Mapping[str, Sequence[int]]) -> dict[int, str]:
        """TEST or TRAIN (or, from the data's own split, VALIDATION) for each row."""
        if self.settings.split:
            return {at: self.rows[at].split or TRAIN for members in owned.values() for at in members}
        if self.settings.holdout == "time":
            side: dict[int, str] = {}
            for members in owned.values():
                latest = sorted(members, key=lambda at: (self.rows[at].time, at))
                tests = max(1, round(self.settings.holdout_fraction * len(members)))
                side |= {at: TEST if place >= len(members) - tests else TRAIN for place, at in enumerate(latest)}
            return side
        tested = self._tested_groups(owned)
        return {at: TEST if self.groups[at] in tested else TRAIN for members in owned.values() for at in members}

    def _tested_groups(self, owned: Mapping[str, Sequence[int]]) -> set[int]:
        """The groups for tests. Each client gets its share of them, in the order of hashes."""
        tested: set[int] = set()
        settled = set(self.public_groups)
        for members in owned.values():
            sizes = Counter(self.groups[at] for at in members)
            target = max(1, round(self.settings.holdout_fraction * len(members)))
            have = sum(size for group, size in sizes.items() if group in tested)
            for group in sorted(sizes, key=self._order):
                if group in settled:
                    continue
                settled.add(group)
                # Not a group that would leave the client too little to learn from.
                if have < target and have + sizes[group] <= len(members) // 2:
                    tested.add(group)
                    have += sizes[group]
        return tested

    def _client(self, name: str, members: Iterable[int], side: Mapping[int, str]) -> Client | None:
        """A client; None if one of its parts would be empty."""
        parts: dict[str, list[int]] = {TRAIN: [], VALIDATION: [], TEST: []}
        for at in members:
            if at in side:
                parts[side[at]].append(at)
        if not parts[VALIDATION]:
            self._hold_out(parts[TRAIN], parts[VALIDATION])
        if not all(parts.values()):
            return None
        languages = Counter(self.rows[at].language for part in parts.values() for at in part)
        texts = {
            part: tuple(self._labelled(self.rows[at], self.groups[at]) for at in found) for part, found in parts.items()
        }
        return Client(name, languages.most_common(1)[0][0], False, texts[TRAIN], texts[VALIDATION], texts[TEST])

    def _hold_out(self, train: list[int], validation: list[int]) -> None:
        """Move whole groups of a client from ``train`` to ``validation``, up to its share."""
        sizes = Counter(self.groups[at] for at in train)
        target, chosen, have = max(1, round(self.settings.validation_fraction * len(train))), set(), 0
        for group in sorted(sizes, key=self._order):
            if have < target and have + sizes[group] <= max(1, len(train) // 2):
                chosen.add(group)
                have += sizes[group]
        validation.extend(at for at in train if self.groups[at] in chosen)
        train[:] = [at for at in train if self.groups[at] not in chosen]

    def _named(self, clients: Sequence[Client]) -> tuple[Client, ...]:
        """The clients, those that take part first, under names that devices can have."""
        unseen = max(1, round(self.settings.unseen * len(clients)))
        if len(clients) - unseen < FEWEST_TRAINED:
            raise ConfigError(
                f"{len(clients)} clients have enough texts, of which {unseen} take no part in training; at least "
                f"{FEWEST_TRAINED} must train: give more texts, or lower data.minimum_texts",
                about="data.client",
                value=len(clients),
            )
        order = sorted(clients, key=lambda client: self._hash("unseen", client.name))
        out = {client.name for client in order[:unseen]}
        usable = all(is_device_id(client.name) for client in clients)
        usable = usable and len({client.name.casefold() for client in clients}) == len(clients)
        sorted_clients = sorted(clients, key=lambda client: (client.name in out, client.name))
        return tuple(
            Client(
                client.name if usable else f"client-{number:04d}",
                client.language,
                client.name in out,
                client.train,
                client.validation,
                client.test,
            )
            for number, client in enumerate(sorted_clients, 1)
        )
