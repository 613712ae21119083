"""onnxruntime-genai behind a few calls: a model, the adapters that it holds, and one text that it remembers.

Adapters are taken as files only: one that was verified is written, as float32, to a private temporary file, which is
removed as soon as it is loaded. The memory of a text (the KV cache) outlives an answer: a prompt that begins with the
same tokens, as the next turn of a conversation does, is read from where it differs.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from client.inference.compose import Adapter
from client.inference.options import Options
from client.inference.trust import GENAI, TOKENIZER, VerifiedBase

GROWTH = 256  # tokens; room for the KV cache is made in steps, so that a few more turns fit into what is there


@dataclass(slots=True)
class _Live:
    """A generator of onnxruntime-genai, and what its KV cache holds."""

    inner: Any
    options: Options
    adapter: str | None  # by name
    capacity: int  # tokens
    tokens: list[int]


class GenerationEngine:
    """A verified base, loaded. Whoever holds it verifies adapters, and asks for one answer at a time."""

    def __init__(self, base: VerifiedBase, threads: int) -> None:
        """Load the model.

        Raises:
            ConfigError: onnxruntime-genai is not installed.
            RuntimeError, ValueError, KeyError, TypeError: The base cannot be loaded.
        """
        self._og = _genai()
        config = self._og.Config(str(base.folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._og.Model(config)
        self._tokenizer = self._og.Tokenizer(self._model)
        self._adapters = self._og.Adapters(self._model)
        self._live: _Live | None = None
        stated = json.loads(base.files[GENAI])["model"]
        self.context = int(stated["context_length"])
        self.vocabulary = int(stated["vocab_size"])
        self.ends = frozenset(map(int, self._tokenizer.eos_token_ids))
        self.marks = _marks(base.files[TOKENIZER])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def decoder(self) -> Any:
        """Something whose ``decode`` turns token after token into text; a character may need several."""
        return self._tokenizer.create_stream()

    def templated(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the model's chat template writes it, up to where the answer begins.

        Raises:
            ConfigError: There is no template, or it does not take these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
        except RuntimeError as error:
            reason = f"this model cannot chat ({first_line(error)})"
            raise ConfigError(f"{reason}; use `edgeadapt device infer`") from error
        return str(text)

    def load(self, adapter: Adapter) -> None:
        """Take over an adapter's tensors, under its name.

        Raises:
            DataError: onnxruntime-genai does not take them.
            EdgeAdaptError: There is no room for the file.
        """
        values = {name: ort.OrtValue.ortvalue_from_numpy(adapter.inputs[name]) for name in sorted(adapter.inputs)}
        container = ort.AdapterFormat()
        container.set_adapter_version(1)
        container.set_model_version(1)
        container.set_parameters(values)
        with TemporaryDirectory(prefix="edgeadapt-") as folder:  # mode 0700
            path = Path(folder) / "adapter"
            path.touch(mode=0o600)
            try:
                container.export_adapter(str(path))
            except RuntimeError as error:
                reason = f"adapter {adapter.name!r} needs {adapter.nbytes} bytes for a moment, which {folder} lacks"
                raise EdgeAdaptError(f"{reason}; free some, or name another folder in TMPDIR") from error
            try:
                self._adapters.load(str(path), adapter.name)
            except RuntimeError as error:
                raise DataError(f"adapter {adapter.name!r} cannot be loaded: {first_line(error)}") from error
            except KeyboardInterrupt:  # comes when the library is done; the name must be free for the next attempt
                self._adapters.unload(adapter.name)
                raise

    def unload(self, name: str) -> None:
        """Give an adapter's tensors up."""
        self.forget()  # one that a generator holds cannot be given up
        self._adapters.unload(name)

    def forget(self) -> None:
        """Give up the memory of the last text, whose state may be anything after an error."""
        self._live = None

    def read(self, prompt: list[int], options: Options, adapter: str | None) -> int:
        """Read a prompt with the adapter of that name, or with none.

        Args:
            prompt: At least one token, and fewer than ``context``.
            options: How the answer will be drawn.
            adapter: One that was loaded.

        Returns:
            How many of the tokens were known from before.

        Raises:
            RuntimeError: The graph does not run.
        """
        live, known = self._usable(options, adapter, min(self.context, len(prompt) + options.max_tokens)), 0
        if live.adapter == adapter:
            # Not the last token of either: the one drawn last was never read, and what follows the prompt is asked for.
            known = _common(live.tokens[:-1], prompt[:-1])
        if live.inner.token_count():
            live.inner.rewind_to(known)
        self._switch(live, adapter)
        live.tokens = prompt[:]
        live.inner.append_tokens(np.array(prompt[known:], dtype=np.int32))
        return known

    def draw(self) -> Iterator[int]:
        """Token after token of what follows the prompt that was read, until the allowed number or the context's end.

        Raises:
            DataError: A token has no finite probability.
            RuntimeError: The graph does not run.
        """
        live = self._live
        assert live is not None  # noqa: S101  # `read` came before
        for _ in range(min(live.options.max_tokens, self.context - len(live.tokens))):
            if not np.isfinite(live.inner.get_logits()).all():
                raise DataError(
                    "an answer is not finite: the adapter's numbers are too large for this base; use another"
                )
            live.inner.generate_next_token()
            token = int(live.inner.get_next_tokens()[0])
            live.tokens.append(token)
            yield token

    def inner(self, options: Options, adapter: str | None) -> Any:
        """onnxruntime-genai's generator for a text of ``options.max_tokens`` in all, for whoever times single tokens.

        The adapter is in use, the text that it remembers is of no more use; the next ``read`` begins anew.
        """
        live = self._usable(options, adapter, min(self.context, options.max_tokens))
        self._switch(live, adapter)
        live.tokens = []
        return live.inner

    def _switch(self, live: _Live, adapter: str | None) -> None:
        if live.adapter != adapter:
            live.inner.set_active_adapter(self._adapters, adapter)
            live.adapter = adapter

    def _usable(self, options: Options, adapter: str | None, needed: int) -> _Live:
        """The generator of the answer before if it can be used again, else a new one.

        It can take another adapter, but never none again; and a seed has to start a sequence of its own.
        """
        live = self._live
        same = live is not None and live.options == options and options.seed is None and live.capacity >= needed
        if live is not None and same and (adapter is not None or live.adapter is None):
            return live
        capacity = min(self.context, -(-needed // GROWTH) * GROWTH)
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=capacity, **options.search(self.vocabulary))
        self._live = None  # frees its KV cache before the next one is made
        self._live = _Live(self._og.Generator(self._model, parameters), options, None, capacity, [])
        return self._live


def first_line(error: Exception) -> str:
    """What a library says was wrong, short enough for a message."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _genai() -> Any:
    # By name, because it is an extra: a device that only classifies does without.
    try:
        og = importlib.import_module("onnxruntime_genai")
    except ModuleNotFoundError as error:
        raise ConfigError("writing text needs onnxruntime-genai: pip install 'edgeadapt[generate]'") from error
    og.disable_telemetry_events()
    return og


def _marks(tokenizer: bytes) -> tuple[str, ...]:
    """The special tokens. The tokenizer finds them in any text, so a message with one could pose as another's."""
    added = json.loads(tokenizer).get("added_tokens", [])
    return tuple(sorted(token["content"] for token in added if token.get("special") and token["content"]))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
