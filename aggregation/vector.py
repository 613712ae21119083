"""The payload under the mask: named segments of bounded numbers, in fixed point, in one ring.

A ``VectorSpec`` cannot be constructed if ``max_clients`` vectors within their bounds could wrap the ring, and
``encode`` refuses values out of bounds. Together they make overflow impossible among honest clients. A client that lies
can only spoil the sum; ``decode`` raises where the total is larger than the survivors could reach.

Steps are powers of two. That costs at most one bit of resolution and makes arithmetic exact: every multiple of the
step, and so every integer where ``step <= 1``, is encoded and summed without error."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from aggregation import ring, wire
from aggregation.errors import ConfigError, DataError, check_fields
from aggregation.keystream import Keystream
from aggregation.privacy import noise
from aggregation.ring import Ring

Floats = NDArray[np.float64] | NDArray[np.float32]
MAX_SIZE = 2**27  # elements: half a gigabyte in a ring of 32 bits
MAX_CLIENTS = 2**20
MAX_SEGMENTS = 4096
_SMALLEST_BOUND, _LARGEST_BOUND = 2.0**-100, 2.0**100
COIN_BITS = 23  # of a rounding coin: its sum with a fraction fits single precision
WRAP_BITS = 40  # noise takes a sum beyond its reach with a probability of at most 2^-WRAP_BITS
_CHUNK = 2**15  # elements: a quarter of a megabyte of float64, and its coins, stay in the second-level cache


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements that share a bound: ``size`` numbers with ``|x| <= bound``, in their own unit.

    ``noise`` is the standard deviation of what each device adds to each of them; 0: nothing.

    Raises ConfigError: ``size`` is not between 1 and ``MAX_SIZE``, or ``bound`` not between 2^-100 and 2^100, nor
    ``noise``, unless it is 0."""

    name: Annotated[str, wire.text(r"[A-Za-z0-9_./-]{1,128}")]
    size: wire.Uint32
    bound: wire.Real
    noise: wire.Real = 0.0

    def __post_init__(self) -> None:
        between = f"between {_SMALLEST_BOUND} and {_LARGEST_BOUND}"
        ranges = (
            ("size", 1 <= self.size <= MAX_SIZE, f"between 1 and {MAX_SIZE}"),
            ("bound", _SMALLEST_BOUND <= self.bound <= _LARGEST_BOUND, between),
            ("noise", self.noise == 0 or _SMALLEST_BOUND <= self.noise <= _LARGEST_BOUND, f"0 or {between}"),
        )
        check_fields(self, "segment.", ranges, f"segment {self.name}: ")

    @property
    def largest(self) -> float:
        """The larger of the bound and its rounding to float32: float32 values clipped to the bound are within it."""
        return max(self.bound, float(np.float32(self.bound)))


def noise_reach(segment: Segment, step: float, clients: int) -> float:
    """What the noise of ``clients`` devices, in steps, exceeds in some element of a segment with a probability of at
    most 2^-``WRAP_BITS``."""
    odds = math.log(2) * (WRAP_BITS + 1) + math.log(segment.size)  # either side of each element
    return noise.reach(clients * (segment.noise / step) ** 2, odds)


@dataclass(frozen=True, slots=True)
class VectorSpec:
    """Layout and fixed-point format of a contribution.

    Guarantee: ``max_clients`` contributions within their bounds cannot wrap the ring, in a segment with noise except
    with a probability of at most 2^-``WRAP_BITS``.

    >>> spec = VectorSpec((Segment("delta", 3, 1.0), Segment("weight", 1, 100.0)), ring_bits=24, max_clients=10)
    >>> spec.size, spec.max_steps, spec.step(spec.segments[1])
    (4, 838860, 0.0001220703125)
    >>> values = {"delta": np.array([1.0, -0.5, 0.25]), "weight": np.array([64.0])}
    >>> total = 2 * spec.encode(values, np.random.default_rng(0))
    >>> spec.decode(total, survivors=2)
    {'delta': array([ 2. , -1. ,  0.5]), 'weight': array([128.])}

    Raises ConfigError: the ring is too small for so many clients, a name is repeated, or a value is out of range."""

    # In wire order, 1 to ``MAX_SEGMENTS``, names unique, at most ``MAX_SIZE`` elements in all.
    segments: Annotated[tuple[Segment, ...], wire.sequence(wire.record(Segment), MAX_SEGMENTS)]
    ring_bits: Annotated[int, wire.uint(8)]  # width of an element, 1 to 64
    max_clients: wire.Uint32  # largest number of contributions in one sum, 1 to ``MAX_CLIENTS``

    def __post_init__(self) -> None:
        ring.dtype(self.ring_bits)
        names = [segment.name for segment in self.segments]
        if not 1 <= len(names) <= MAX_SEGMENTS or len(set(names)) != len(names):
            raise ConfigError(
                f"a vector has 1 to {MAX_SEGMENTS} segments, each with its own name; got {len(names)}",
                about="vector.segments",
            )
        ranges = (
            ("size", self.size <= MAX_SIZE, f"at most {MAX_SIZE}"),
            ("max_clients", 1 <= self.max_clients <= MAX_CLIENTS, f"between 1 and {MAX_CLIENTS}"),
        )
        check_fields(self, "vector.", ranges)
        if self.max_steps < 1:
            raise ConfigError(
                f"a ring of {self.ring_bits} bits cannot hold a sum of {self.max_clients} clients: use more bits",
                about="vector.ring_bits",
            )
        for segment in self.segments:
            self.step(segment)

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    def segment(self, name: str) -> Segment:
        """The segment of that name; ``KeyError`` if it does not exist."""
        return {segment.name: segment for segment in self.segments}[name]

    @property
    def max_steps(self) -> int:
        """Largest magnitude of one client's element, in steps: ``max_clients`` times it is below half the ring."""
        # At most 2^40: that leaves float64 room for a coin, and no model needs a finer step.
        return min(((1 << (self.ring_bits - 1)) - 1) // self.max_clients, 1 << 40)

    def step(self, segment: Segment) -> float:
        """Resolution of ``segment`` in its unit: the finest power of two with ``largest / step <= max_steps``.

        With noise, the finest one with which the sum of ``max_clients`` values and their noise is below half the ring,
        and the noise of one device has at most ``noise.MAX_DEVIATION`` steps. Raises ConfigError: the noise does not
        fit the ring in steps of the bound."""
        if segment.noise:
            return self._noisy_step(segment)
        step = math.ldexp(1.0, math.frexp(segment.largest / self.max_steps)[1] - 1)
        return step if math.ceil(segment.largest / step) <= self.max_steps else 2 * step

    def _noisy_step(self, segment: Segment) -> float:
        # A power of two that is not above the finest step that can do.
        step = math.ldexp(1.0, math.frexp(max(segment.noise / noise.MAX_DEVIATION, segment.largest / 2**40))[1] - 1)
        half = (1 << (self.ring_bits - 1)) - 1
        while step <= segment.largest:
            if segment.noise <= noise.MAX_DEVIATION * step and self._reach(segment, step, self.max_clients) <= half:
                return step
            step *= 2
        raise ConfigError(
            f"a ring of {self.ring_bits} bits cannot hold the sum of {self.max_clients} clients with noise of "
            f"{segment.noise:g}: use more bits",
            about="vector.ring_bits",
        )

    @staticmethod
    def _reach(segment: Segment, step: float, clients: int) -> int:
        """The largest magnitude of an element of the sum of ``clients`` contributions, in steps; with noise except with
        a probability of at most 2^-``WRAP_BITS`` for any element."""
        values = clients * math.ceil(segment.largest / step)
        if not segment.noise:
            return values
        return values + math.floor(noise_reach(segment, step, clients))

    def to_ring(self, steps: NDArray[np.int64]) -> Ring:
        """Whole numbers of steps as elements of the ring. Shape ``(size,)``, whatever their magnitude."""
        return steps.astype(ring.dtype(self.ring_bits))

    def encode(self, values: Mapping[str, Floats], rng: np.random.Generator) -> Ring:
        """Round ``values`` to ring steps without bias (stochastic rounding).

        Guarantee: the expectation of ``decode(encode(values))`` is ``values`` to within 2^-``COIN_BITS`` of a step;
        each error is below one step; multiples of the step are exact.

        Returns:
            Shape ``(size,)``, of ``ring.dtype(ring_bits)``; negative numbers are in two's complement.

        ``values``: name → float32 or float64 of shape ``(segment.size,)``, each ``|x| <= segment.bound``; exactly the
        spec's names. ``rng``: draws the key of the rounding coins, 32 bytes a call. Raises DataError: a segment is
        missing, unknown, of another shape or type, not finite, or out of its bound."""
        if set(values) != {segment.name for segment in self.segments}:
            raise DataError(f"segments {sorted(values)} are not those of the spec", about="vector.segments")
        out = np.empty(self.size, ring.dtype(self.ring_bits))
        coins = Keystream(rng.bytes(32))  # four times as fast as drawing each coin from ``rng``
        for segment, part in self._parts(out):
            given = values[segment.name]
            if given.shape != (segment.size,):
                raise DataError(
                    f"segment {segment.name} has shape {given.shape}, not ({segment.size},)",
                    about=f"vector.{segment.name}",
                )
            if given.dtype not in (np.float32, np.float64):
                raise DataError(
                    f"segment {segment.name} holds {given.dtype}, not float32 or float64",
                    about=f"vector.{segment.name}",
                )
            for start in range(0, segment.size, _CHUNK):
                chunk = slice(start, start + _CHUNK)
                self._round(self._steps(segment, given[chunk]), coins, part[chunk])
        return out

    def _steps(self, segment: Segment, given: Floats) -> NDArray[Any]:
        """``given`` in units of the step: exact, since a step is a power of two."""
        largest = float(max(given.max(), -given.min()))
        if not largest <= (segment.largest if given.dtype == np.float32 else segment.bound):  # also true for NaN
            raise DataError(
                f"segment {segment.name} has a value of {largest}, its bound is {segment.bound}",
                about=f"vector.{segment.name}",
            )
        per_unit = 1 / self.step(segment)
        wide = not 2.0**-126 <= per_unit < 2.0**128
        return np.multiply(given, per_unit, dtype=np.float64 if wide else given.dtype)

    def zeros(self) -> dict[str, NDArray[np.float64]]:
        """The sums of nothing: name → float64 zeros of shape ``(segment.size,)``."""
        return {segment.name: np.zeros(segment.size) for segment in self.segments}

    @staticmethod
    def _round(steps: NDArray[Any], coins: Keystream, out: Ring) -> None:
        """Write floor(steps + coin), with coins uniform over [0, 1), in the precision of ``steps``.

        Whole part and fraction are separated first. The fraction is exact except just below an integer, where
        it may be rounded to 1. Fraction plus coin has 24 bits at most, so the sum is below 2, and below 1 where the
        fraction is 0: a whole step is never lifted."""
        drawn = np.empty(out.size, np.int32)
        coins.read_into(drawn.data.cast("B"))
        drawn = drawn.view(np.uint32)
        drawn >>= 32 - COIN_BITS
        coin = drawn.view(np.int32).astype(steps.dtype)  # signed is faster, and the top bit is free
        coin *= 2.0**-COIN_BITS
        whole = np.floor(steps)
        steps -= whole
        steps += coin
        np.floor(steps, out=steps)
        whole += steps
        # Negative numbers in two's complement: bits above the ring do not count.
        np.copyto(out.view(f"<i{out.itemsize}"), whole, casting="unsafe")

    def decode(self, total: Ring, survivors: int) -> dict[str, NDArray[np.float64]]:
        """Turn the sum of ``survivors`` contributions back into numbers.

        Returns:
            Name → float64 of shape ``(segment.size,)``: the sums, in the segment's unit, exact.

        ``total``: shape ``(size,)``, of ``ring.dtype(ring_bits)``; only the low ``ring_bits`` bits of an element count.
        ``survivors``: number of contributions in the sum, 1 to ``max_clients``. Raises DataError: another number of
        survivors, another shape or type, or a sum that ``survivors`` clients within their bounds cannot reach, with
        noise except with a probability of 2^-``WRAP_BITS``."""
        if not 1 <= survivors <= self.max_clients:
            raise DataError(f"{survivors} survivors are not between 1 and {self.max_clients}", about="survivors")
        ring.require_vector(total, self.size, self.ring_bits)
        sums = {}
        for segment, part in self._parts(total):
            step = self.step(segment)
            reach = self._reach(segment, step, survivors)
            found = sums[segment.name] = np.empty(segment.size)
            for start in range(0, segment.size, _CHUNK):
                chunk = slice(start, start + _CHUNK)
                signed = self._signed(part[chunk])
                if not -reach <= signed.min() <= signed.max() <= reach:
                    raise DataError(
                        f"segment {segment.name} is more than {survivors} clients within its bound can sum to",
                        about=f"vector.{segment.name}",
                    )
                np.multiply(signed, step, out=found[chunk])
        return sums

    def _signed(self, part: Ring) -> NDArray[np.int16] | NDArray[np.int32] | NDArray[np.int64]:
        unused = 8 * part.itemsize - self.ring_bits
        high = part << unused  # the ring's top bit becomes the sign
        return high.view(f"<i{part.itemsize}") >> unused

    def _parts(self, vector: Ring) -> Iterator[tuple[Segment, Ring]]:
        start = 0
        for segment in self.segments:
            yield segment, vector[start : start + segment.size]
            start += segment.size
