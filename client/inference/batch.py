"""Writes many answers at once with ONNX Runtime: rows of a batch, each with an adapter and a KV cache of its own.

A step reads a piece of one prompt, and writes a token of every answer whose prompt was read: an answer begins and ends
at any step, whatever the others do. A row is given what it is given alone, up to rounding. Rows that a graph does not
compute each for itself (one scale for all activations, a parameter that adapters replace, a traced graph) run one after
the other in each step.

The rows that write are the first places of the batch. The KV cache of an answer stays in its place behind them until
another needs that: a prompt of the same tenant and adapter that begins with the same tokens is read from where it
differs.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from aggregation.errors import DataError, EdgeAdaptError, one_line
from client.inference import usage
from client.inference.engine import GROWTH, PIECE, ModelText, genai, not_finite
from client.inference.generate import ChatMessage, Draft, Prompts
from client.inference.guide import GuidedAnswer
from client.inference.library import Adapter, AdapterCache, Composition, Library
from client.inference.text import Answer, Finish, SamplingParams, checked
from edgeadapt.bases.classifiergraph import BY_ADAPTER, MIN_RANK, RANK, open_session
from edgeadapt.formats.bundle import GENERATION, MODEL, VerifiedBase
from edgeadapt.formats.graphinputs import SCALES, empty_inputs, with_placeholders
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.policy import blocks

ROWS = 32  # answers that are written at once
MAX_CACHE = 2**30  # bytes of all rows' KV cache, of which only what was written takes memory; one row may have more
PAST, PRESENT, CLOSE = "past_key_values", "present", 0.05  # of the largest logit


@dataclass(slots=True, eq=False)
class Row:
    """An answer that waits, is written, or was."""

    draft: Draft
    prompt: list[int]  # with placeholders for virtual tokens
    adapter: Adapter | None
    inputs: Tensors = field(repr=False)
    owner: str
    guided: GuidedAnswer | None
    rng: np.random.Generator
    gone: bool = False  # nobody waits for it
    next: int = 0  # the token that was written last, and is not in the KV cache
    cached: list[int] = field(default_factory=list)
    used: float = 0.0  # when the place was left
    begun: float = 0.0

    @property
    def needs(self) -> int:
        """Count the tokens for which its KV cache has room."""
        return len(self.prompt) + self.draft.limit

    def shared(self, other: "Row") -> int:
        """Count the tokens of this prompt, without its last one, that are in the KV cache of another row."""
        if self.adapter is not other.adapter or self.owner != other.owner:
            return 0
        pairs = zip(self.prompt[:-1], other.cached, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


Part = str | Answer | EdgeAdaptError


class DecoderGraph:
    """The graph of a language model, and the KV cache of the places of a batch."""

    def __init__(self, base: VerifiedBase, threads: int) -> None:
        """Load a verified graph. Raises what ONNX Runtime raises."""
        self._slots = base.manifest.slots
        self._session = open_session(base.files[MODEL], base.folder, self._slots, threads)
        self._types = {value.name: value for value in self._session.get_inputs()}
        search = json.loads(base.files[GENERATION])["search"]
        self._in_place = bool(search.get("past_present_share_buffer"))
        self._cache: Tensors = {}
        self.places = self.capacity = 0  # capacity: tokens of a place
        self._adapters: Tensors = {}  # of the places that write
        shapes = [value.shape for name, value in self._types.items() if name.startswith(PAST)]
        self._bytes = sum(4 * int(shape[1]) * int(shape[3]) for shape in shapes)  # of a token
        self.resize(2, 1, 0)
        self.batches = self._independent()

    def resize(self, places: int, capacity: int, keep: int) -> None:
        """Give ``places`` rows room for ``capacity`` tokens each; keep the KV cache of the first ``keep``."""
        old, self._cache, self.places, self.capacity = self._cache, {}, places, capacity
        for name, value in self._types.items():
            if name.startswith(PAST):
                self._cache[name] = np.zeros((places, value.shape[1], capacity, value.shape[3]), np.float32)
                if keep:
                    length = min(capacity, old[name].shape[2])
                    self._cache[name][:keep, :, :length] = old[name][:keep, :, :length]

    def most(self, capacity: int) -> int:
        """Count the rows of ``capacity`` tokens that ``MAX_CACHE`` has room for."""
        return max(1, min(ROWS, MAX_CACHE // (self._bytes * capacity)))

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the KV caches of two places, of at most ``tokens``."""
        for values in self._cache.values() if one != other else ():
            values[[one, other], :, :tokens] = values[[other, one], :, :tokens]

    def put(self, place: int, inputs: Tensors, *, first: bool) -> None:
        """Let a place write with an adapter; ``first``: no other place writes."""
        for name, value in inputs.items() if self.batches else ():
            fill, held = 1.0 if name.endswith(SCALES) else 0.0, None if first else self._adapters[name]
            least = [MIN_RANK if size.startswith(RANK) else 0 for size in self._slots[name]]
            sizes = tuple(map(max, least, value.shape, least if held is None else held.shape[1:]))
            if held is None or held.shape[1:] != sizes:
                self._adapters[name] = np.full((ROWS, *sizes), fill, np.float32)
                if held is not None:
                    self._adapters[name][tuple(map(slice, held.shape))] = held
            row = self._adapters[name][place]
            row[...] = fill
            row[tuple(map(slice, value.shape))] = value

    def move(self, place: int, to: int) -> None:
        """Let a place write with the adapter of another."""
        for values in self._adapters.values() if place != to else ():
            values[to] = values[place]

    def read(self, place: int, tokens: Sequence[int], cached: int, inputs: Tensors) -> Floats:
        """Return the logits after the last of some tokens, which follow those in the cache: shape ``(vocabulary,)``."""
        rows = self._run(slice(place, place + 1), np.array([tokens], np.int64), np.array([cached]), inputs)
        logits: Floats = rows[0]
        return logits

    def write(self, tokens: Sequence[int], cached: Sequence[int]) -> Floats:
        """Return the logits after a token of each of the first places: shape ``(places, vocabulary)``."""
        count = len(tokens)
        inputs = {name: values[:count] for name, values in self._adapters.items()}
        return self._run(slice(count), np.array(tokens, np.int64)[:, np.newaxis], np.array(cached), inputs)

    def _run(self, places: slice, ids: NDArray[np.int64], cached: NDArray[np.int64], inputs: Tensors) -> Floats:
        begin, length = int(cached.max()), ids.shape[1]
        positions = cached[:, np.newaxis] + np.arange(length)
        mask = np.arange(begin + length) < cached[:, np.newaxis] + length
        values: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "position_ids": positions}
        feeds = {**inputs, **{name: value for name, value in values.items() if name in self._types}}
        cache = {name: values[places] for name, values in self._cache.items()}
        binding = self._session.io_binding()
        if not self._in_place:
            feeds |= {name: np.ascontiguousarray(values[:, :, :begin]) for name, values in cache.items()}
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        binding.bind_output("logits")
        for name, part in cache.items():
            if self._in_place:
                held = ort.OrtValue.ortvalue_from_numpy(part)
                binding.bind_ortvalue_input(name, held)
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), held)
            else:
                binding.bind_output(name.replace(PAST, PRESENT, 1))
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        if not self._in_place:
            for kept, added in zip(cache.values(), present, strict=True):
                kept[:, :, begin : begin + length] = added.numpy()[:, :, begin:]
        result: Floats = logits.numpy()[:, -1]
        return result

    def _independent(self) -> bool:
        """Ask the graph whether a row of a batch depends on its own token and adapter alone."""
        if not self._in_place or not all(name.endswith(BY_ADAPTER) for name in self._slots):
            return False
        rng = np.random.default_rng(0)
        symbols = {size for sizes in self._slots.values() for size in sizes if not size.isdigit()}
        size = {symbol: MIN_RANK if symbol.startswith(RANK) else 1 for symbol in symbols}
        shapes = {name: [size.get(one) or int(one) for one in sizes] for name, sizes in self._slots.items()}
        one, two, three = ({n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()} for _ in range(3))
        try:
            alone, rows = self._run(slice(1), np.array([[1]]), np.array([0]), one)[0], []
            for token, other in ((2, two), (3, three)):
                pair = {name: np.stack([one[name], other[name]]) for name in one}
                rows.append(self._run(slice(2), np.array([[1], [token]]), np.array([0, 0]), pair)[0])
        except Exception:  # onnxruntime raises classes without a common base
            return False
        near = np.abs(rows[0] - alone).max() <= CLOSE * np.abs(alone).max()
        return bool(near) and np.array_equal(*rows)


class BatchGenerator(Prompts):
    """The language model of a bundle, for many answers at once. ``begin`` may be called by any thread, ``step`` by one
    at a time."""

    def __init__(self, library: Library, text: ModelText, graph: DecoderGraph, loaded: AdapterCache[Adapter]) -> None:
        super().__init__(library, text)
        self._graph, self._loaded = graph, loaded
        self._bare = empty_inputs(library.manifest.slots)
        self._waiting: list[Row] = []  # ``add`` may append during a step
        self._places: list[Row | None] = []
        self._writing = 0  # places, the first ones
        self._reading: int | None = None  # the place of the row whose prompt is being read

    @classmethod
    def of(cls, library: Library, threads: int, loaded: int, loaded_bytes: int) -> Self:
        """Load a verified base. Arguments and errors as ``Generator.open``."""
        cache = AdapterCache[Adapter](loaded, loaded_bytes, lambda adapter: adapter.nbytes, library.is_current)
        config = genai().Config(str(library.base.folder))
        try:
            text, graph = ModelText(library.base, config), DecoderGraph(library.base, threads)
        except Exception as error:  # onnxruntime raises classes without a common base
            reason = f"this version cannot load the base in {library.bundle}: {one_line(error)}"
            raise DataError(reason, about=MODEL) from error
        library.base.check()
        return cls(library, text, graph, cache)

    def begin(
        self, said: str | Sequence[ChatMessage], params: SamplingParams, adapter: Composition | None, owner: str
    ) -> Row:
        """Prepare the continuation of a text, or the answer to messages, for ``add``. What the policy blocks in an
        earlier message is answered as if it were the last one.

        ``owner``: who may share a KV cache. Beams and penalties are ignored. Raises as ``Generator.complete`` and
        ``Generator.answer``.
        """
        if isinstance(said, str):
            asked, prompt = said, self._text.encode(checked(said))
        else:
            patterns, readings = self.library.base.policy.input, self._text.readings
            said = [replace(one, role="user") for one in said if blocks(patterns, *readings(one.content))][:1] or said
            asked, prompt = said[-1].content, self.tokens(said)
        loaded = None if adapter is None else self._adapter(adapter)
        draft, guided = self._draft(asked, prompt, params, loaded), self._text.guided(params.guide)
        prompt = with_placeholders(prompt, loaded.virtual_tokens if loaded else 0)
        inputs, rng = loaded.inputs if loaded else self._bare, np.random.default_rng(params.seed)
        return Row(draft, prompt, loaded, inputs, owner, guided, rng)

    def _adapter(self, composition: Composition) -> Adapter:
        if (adapter := self._loaded.get(composition)) is None:
            adapter = self._loaded[composition] = self.library.load(composition)
        return adapter

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._writing or self._reading is not None)

    @property
    def writing(self) -> int:
        return self._writing

    def clear(self) -> list[Row]:
        """Forget all rows, which a failure may have left half done; return them."""
        rows = [row for row in (*self._places, *self._waiting) if row is not None]
        self._places, self._writing, self._reading = [None] * len(self._places), 0, None
        self._waiting.clear()
        return rows

    def step(self) -> list[tuple[Row, Part]]:
        """Read a piece of a prompt, and write a token of each answer that was begun.

        Returns pieces of answers; for one that ended, its ``Answer``; for one that cannot go on, the error.
        """
        parts: list[tuple[Row, Part]] = []
        for place in reversed(range(self._writing)):
            if self._row(place).gone:
                self._leave(place)
        if self._reading is not None and self._row(self._reading).gone:
            self._reading = None
        if self._writing:
            self._write(parts)
        if self._reading is None:
            self._next(parts)
        if self._reading is not None:
            self._read(self._reading, parts)
        return parts

    def _row(self, place: int) -> Row:
        row = self._places[place]
        assert row is not None  # noqa: S101  # a row reads or writes there
        return row

    def _next(self, parts: list[tuple[Row, Part]]) -> None:
        """Give a row that waits a place, if there is one: the first of the owner who has the fewest."""
        for row in [one for one in self._waiting if one.gone or one.draft.finish is Finish.BLOCKED]:
            self._waiting.remove(row)
            parts += [(row, row.draft.text), (row, row.draft.answer)]
        of = Counter(self._row(place).owner for place in range(self._writing))
        if not self._waiting or not self._has_room((row := min(self._waiting, key=lambda one: of[one.owner])).needs):
            return
        self._waiting.remove(row)

        def fit(place: int) -> tuple[int, float]:
            held = self._places[place]
            return (0, -np.inf) if held is None else (-row.shared(held), held.used)

        self._reading = place = min(range(self._writing, len(self._places)), key=fit)
        if (held := self._places[place]) is not None:
            row.cached = held.cached[: row.shared(held)]
        row.draft.reused = max(0, len(row.cached) - len(row.prompt) + row.draft.prompt_tokens)
        row.begun, self._places[place] = time.perf_counter(), row

    def _has_room(self, needed: int) -> bool:
        """Make a place for a row of as many tokens, where the memory suffices."""
        if needed <= self._graph.capacity and self._writing < len(self._places):
            return True
        needed = max(needed, *(self._row(place).needs for place in range(self._writing)), GROWTH)
        needed = min(self._text.context, 1 << (needed - 1).bit_length())
        if self._writing >= (most := self._graph.most(needed)):
            return False
        self._graph.resize(most, needed, self._writing)
        self._places = [*self._places[: self._writing], *[None] * (most - self._writing)]
        return True

    def _read(self, place: int, parts: list[tuple[Row, Part]]) -> None:
        row = self._row(place)
        piece, row.used = row.prompt[len(row.cached) : len(row.cached) + PIECE], time.perf_counter()
        try:
            logits = self._graph.read(place, piece, len(row.cached), row.inputs)
        except Exception as error:  # onnxruntime raises classes without a common base
            parts.append((row, _broken(error)))
            self._places[place] = self._reading = None
            return
        row.cached += piece
        if len(row.cached) < len(row.prompt):
            return
        to, other = self._writing, self._places[self._writing]
        self._graph.swap(place, to, max(len(row.cached), 0 if other is None else len(other.cached)))
        self._places[place], self._places[to] = other, row
        self._graph.put(to, row.inputs, first=not to)
        self._reading, self._writing = None, to + 1
        if not self._take(row, logits, parts):
            self._leave(to)

    def _write(self, parts: list[tuple[Row, Part]]) -> None:
        rows = [self._row(place) for place in range(self._writing)]
        for place, logits in reversed(list(enumerate(self._logits(rows)))):
            row = rows[place]
            if isinstance(logits, EdgeAdaptError):
                parts.append((row, logits))
                row.cached, going = [], False
            else:
                row.cached.append(row.next)
                going = self._take(row, logits, parts)
            if not going:
                self._leave(place)

    def _logits(self, rows: Sequence[Row]) -> list[Floats | EdgeAdaptError]:
        """Run the rows that write, at once where the graph can; if that fails, each alone, so that one harms none."""
        try:
            if self._graph.batches:
                return list(self._graph.write([row.next for row in rows], [len(row.cached) for row in rows]))
        except Exception:  # noqa: S110  # the rows alone show whose error it is
            pass
        found: list[Floats | EdgeAdaptError] = []
        for place, row in enumerate(rows):
            try:
                found.append(self._graph.read(place, [row.next], len(row.cached), row.inputs))
            except Exception as error:  # onnxruntime raises classes without a common base
                found.append(_broken(error))
        return found

    def _take(self, row: Row, logits: Floats, parts: list[tuple[Row, Part]]) -> bool:
        """Write a row's next token; return whether it goes on."""
        try:
            if not np.isfinite(logits).all():
                raise not_finite()
            if row.guided is not None:
                logits = np.where(row.guided.allowed(), logits, -np.inf)
            row.next = row.draft.params.sample(logits, row.rng)
            if row.guided is not None:
                row.guided.append(row.next)
        except EdgeAdaptError as error:
            parts.append((row, error))
            row.cached = []
            return False
        if piece := row.draft.take(row.next):
            parts.append((row, piece))
        if row.draft.finish is Finish.INTERRUPTED:
            return True
        parts.append((row, row.draft.answer))
        if row.adapter is not None:
            usage.count_answers(self.library.bundle, [(row.adapter, None, time.perf_counter() - row.begun)])
        return False

    def _leave(self, place: int) -> None:
        """Let a row that wrote leave its place to the last one that writes."""
        last, row = self._writing - 1, self._row(place)
        row.used = time.perf_counter()
        self._graph.swap(place, last, max(len(row.cached), len(self._row(last).cached)))
        self._graph.move(last, place)
        self._places[place], self._places[last] = self._places[last], row
        self._writing = last


def _broken(error: Exception) -> DataError:
    return DataError(f"the model does not run with this adapter: {one_line(error)}", about="adapter")
