"""The traced path: any decoder of transformers, traced by torch operator by operator. It is used for what
onnxruntime-genai's builder does not know. Nothing is fused, so a token takes longer than on the builder path; inputs,
outputs, files and the steps that follow (quantization, slots, headers) are the same."""

import inspect
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import GENERATION, MODEL, TOKENIZER
from export.causal.builder import QUIET, DecoderGraph
from export.causal.sample import Sample, matches
from export.onnx import graph, matmuls, tasks
from export.onnx.exported import Report
from export.onnx.graph import hollow
from export.onnx.peftmodel import replace_conv1d
from export.onnx.tensorstore import OnDisk

TOKENS = ("input_ids", "attention_mask", "position_ids")  # not every family has the last
PARTS = ("key", "value")
EXAMPLE = {"batch": 2, "sequence": 3, "past": 4}  # torch.export treats a size of 0 or 1 as a constant
CONTEXT_LIMIT = 2**24  # tokens; a tokenizer without a limit states a far larger number


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """The shape of a decoder's KV cache: for each layer, keys and values of ``(rows, heads, tokens, width)``."""

    keyword: str  # the argument of the model's ``forward``, and the field of its output
    layers: int
    heads: int
    width: int

    @property
    def names(self) -> list[str]:
        """List the graph's inputs; its outputs begin with ``present`` instead."""
        return [f"past_key_values.{layer}.{part}" for layer in range(self.layers) for part in PARTS]


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module, keyword: str) -> None:
        super().__init__()
        self.model, self.keyword = model, keyword

    def forward(self, tokens: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        # Without a configuration no layer drops tokens that left its window: the mask hides them, as in training.
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True))
        answer = self.model(**tokens, **{self.keyword: cache}, use_cache=True)
        return (answer.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values)))


def build(base: Base, sample: Sample, store: OnDisk, report: Report = lambda *_: None) -> DecoderGraph:
    """Trace token ids, attention mask, positions if the family has any, and KV cache → logits and the next KV cache.

    ``sample``: torch's logits for a short text; ``store``: holds the weights of the graph. Raises ConfigError: the
    configuration lacks a size; torch cannot trace the architecture; the graph does not give torch's logits; its cache
    is not equal keys and values in each layer; or the base states neither the longest text nor the token that ends one.
    """
    model = pretrained.load(base, AutoModelForCausalLM, offload=store.place.parent / "traced")
    sizes = tasks.sizes(model.config)
    cache = cache_of(model, sizes)
    files = _files(base, model.config, sizes, cache, model.generation_config.eos_token_id)
    model.set_experts_implementation("batched_mm")  # the one form of a mixture of experts that torch can trace
    report("tracing the graph", 0, 0)
    traced = _trace(model, cache, store)
    matmuls.normalize(traced, store)
    matmuls.share_embedding(traced, store)
    store.keep([traced])
    if not matches(traced, sample, store, report):
        raise ConfigError(
            f"the graph that torch traces of {base.folder} does not give torch's logits; it cannot be exported",
            about="logits",
        )
    return DecoderGraph(traced, files)


def cache_of(model: Any, sizes: tasks.Sizes) -> KeyValueCache:
    """Find the shape of the KV cache by a run, because no configuration states it for every family. Raises ConfigError:
    it is not equal keys and values in each layer."""
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    try:
        with torch.no_grad():
            answer = model(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=True)
        layers = getattr(getattr(answer, keyword, None), "layers", [])
    except (IndexError, ValueError):  # transformers' cache raises it where layers have a state instead
        layers = []
    shapes = {tuple(part.shape) for layer in layers for part in (_part(layer, "keys"), _part(layer, "values"))}
    if len(layers) != sizes.layers or len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[2] != 3:
        raise ConfigError(
            f"the cache of {model.config.model_type!r} is not equal keys and values in each layer, and cannot "
            "be exported",
            about="past_key_values",
        )
    return KeyValueCache(keyword, len(layers), int(shape[1]), int(shape[3]))


def _part(layer: Any, name: str) -> Tensor:
    part = getattr(layer, name, None)
    return part if isinstance(part, Tensor) else torch.empty(0)


def _trace(model: Any, cache: KeyValueCache, store: OnDisk) -> onnx.ModelProto:
    weights = hollow(model)
    replace_conv1d(model)
    batch, sequence, past, total = (Dim(name) for name in ("batch", "sequence", "past", "total"))
    rows, length, before = EXAMPLE.values()
    takes = inspect.signature(model.forward).parameters
    examples = {
        "input_ids": torch.ones(rows, length, dtype=torch.int64),
        "attention_mask": torch.ones(rows, before + length, dtype=torch.int64),
        "position_ids": torch.arange(before, before + length).repeat(rows, 1),
    }
    tokens = {name: examples[name] for name in TOKENS if name in takes}
    kept = [torch.ones(rows, cache.heads, before, cache.width) for _ in cache.names]
    shapes = {name: {0: batch, 1: total if name == "attention_mask" else sequence} for name in tokens}
    return graph.export(
        _Decoder(model, cache.keyword),
        {"tokens": tokens, "past": kept},
        {"tokens": shapes, "past": [{0: batch, 2: past} for _ in kept]},
        inputs=[*tokens, *cache.names],
        outputs=[graph.ANSWER, *(name.replace("past_key_values", "present") for name in cache.names)],
        store=store,
        weights=weights,
    )


def _files(base: Base, config: Any, sizes: tasks.Sizes, cache: KeyValueCache, chosen: Any) -> dict[str, bytes]:
    """Make the other files that onnxruntime-genai reads: its settings, and the tokenizer as transformers saves it.
    ``chosen`` are the tokens that end a text according to ``generation_config.json``, which transformers reads
    first."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many classes, with no common base
        raise ConfigError(
            f"the tokenizer in {base.folder} cannot be opened: {error}", about="tokenizer_config.json"
        ) from error
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if context > CONTEXT_LIMIT:
        raise ConfigError(
            f"nothing in {base.folder} limits the length of a text; state max_position_embeddings in config.json",
            about="max_position_embeddings",
        )
    end = next((ids for ids in (chosen, config.eos_token_id, tokenizer.eos_token_id) if ids is not None), None)
    if end is None:
        raise ConfigError(
            f"nothing in {base.folder} says which token ends a text; state eos_token_id in config.json",
            about="eos_token_id",
        )
    settings = _settings(config, sizes, cache, context, end)
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as name:
        tokenizer.save_pretrained(name)
        files = {path.name: path.read_bytes() for path in sorted(Path(name).iterdir()) if path.is_file()}
    files[TOKENIZER] = (base.folder / TOKENIZER).read_bytes()
    return files | {GENERATION: json.dumps(settings, indent=4, sort_keys=True).encode()}


def _settings(config: Any, sizes: tasks.Sizes, cache: KeyValueCache, context: int, end: Any) -> dict[str, Any]:
    """Fill https://onnxruntime.ai/docs/genai/reference/config.html; "decoder" is its type for graphs of any family."""
    first = end[0] if isinstance(end, list) else end
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    decoder = {
        "filename": MODEL,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **QUIET},
        "head_size": cache.width,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": cache.layers,
        "num_key_value_heads": cache.heads,
        "inputs": {name: name for name in TOKENS} | names,
        "outputs": {
            "logits": graph.ANSWER,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": "decoder",
            "decoder": decoder,
            "context_length": context,
            "vocab_size": sizes.vocabulary,
            "bos_token_id": first if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": first if config.pad_token_id is None else config.pad_token_id,
        },
        # The graph returns a longer cache instead of writing to a shared buffer.
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }
