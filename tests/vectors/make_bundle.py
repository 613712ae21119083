"""Makes the test vectors of docs/reference/bundle-format.md, ``tests/vectors/bundle``, with the project's own exporter.

    python -m tests.vectors.make_bundle

Run it again when the format changes, and mend the page and ``reader`` with it. The base is a classifier of a few
kilobytes. Every number of base and adapters is drawn from SHA-256, so that they can be written again. Everybody knows
the keys.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from client.inference.trust import Trust
from edgeadapt.formats.bundle import TOKENIZER, TRUST
from edgeadapt.formats.files import sha256
from edgeadapt.formats.graphinputs import LORA_A, LORA_B, OFFSET, PEFT_PREFIX
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import BaseManifest, Format, PrivacyBound
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.storage import WorkFolder
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx import headers
from export.onnx.classifier import open_base
from export.onnx.exported import ExportedBase, Profile, written
from tests.vectors import bundle_cases

FOLDER = Path(__file__).with_name("bundle")
FORMATS: tuple[Format, ...] = ("fp32", "fp16", "int8", "int4")
WIDTH, OUT, VOCABULARY = 40, 5, 12  # in int4, a row of 40 has two blocks, and a row of 5 is stored in int8
WORDS = ("turn", "on", "off", "the", "light", "play", "music", "please")
LABELS = ("Light", "Music", "Zoë 灯")
TEXTS = ("turn on the light", "play music please")
QUERY, VALUE, SILENT = "encoder.query", "encoder.value", "encoder.silent"  # the last has no adapter
OFFSET_SLOT = SILENT + OFFSET  # has no adapter either
RANKS = {QUERY: 3, VALUE: 2}
SLOTS = {
    QUERY + LORA_A: (str(WIDTH), "rank_0"),
    QUERY + LORA_B: ("rank_0", str(WIDTH)),
    VALUE + LORA_A: (str(WIDTH), "rank_1"),
    VALUE + LORA_B: ("rank_1", str(OUT)),
    SILENT + LORA_A: (str(OUT), "rank_2"),
    SILENT + LORA_B: ("rank_2", str(OUT)),
    OFFSET_SLOT: ("given_0", str(OUT)),
    "head.weight": ("labels", str(OUT)),
    "head.bias": ("labels",),
}
CONFIG = PeftConfig(
    "LORA", 3, 4.5, ("query", "value"), rank_pattern=(("value", 2),), alpha_pattern=(("value", 2e-05),), use_rslora=True
)
VERSION, TEMPERATURE, PRIVACY = 7, 1.25, PrivacyBound(6.5, 1e-6)
TOKENS = ("input_ids", "attention_mask")
SEEN = "trust.seen.json"
VENDOR, OWNER = bundle_cases.key("vendor"), bundle_cases.key("owner")


def drawn(name: str, *shape: int) -> Floats:
    """Numbers in [-1, 1) in place of random ones."""
    size = 2 * int(np.prod(shape))
    blocks = (hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(-(-size // 32)))
    whole = np.frombuffer(b"".join(blocks)[:size], "<i2").astype(np.float32) / np.float32(2**15)
    return whole.reshape(shape)


def graph() -> onnx.ModelProto:
    """Three layers, their mean over the tokens, and a head: ``input_ids``, ``attention_mask``, slots → ``logits``."""
    layers = {QUERY: (WIDTH, WIDTH), VALUE: (WIDTH, OUT), SILENT: (OUT, OUT)}
    weights = {f"{path}.weight": drawn(path, *shape) / np.float32(4) for path, shape in layers.items()}
    weights |= {"embedding": drawn("embedding", VOCABULARY, WIDTH)}
    axes = {"tokens": [1], "last": [-1], "one_after": [0, 1], "rows": [-2], "first": [0]}
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["read"]),
        *_layer("read", QUERY),
        *_layer(f"{QUERY}.out", VALUE),
        *_layer(f"{VALUE}.out", SILENT),
        # The first of what is given and of zeros. Not a sum: many versions of ONNX Runtime add up no rows to no row.
        helper.make_node("Pad", [OFFSET_SLOT, "one_after", "", "rows"], ["padded"]),
        helper.make_node("Gather", ["padded", "first"], ["offset"], axis=-2),
        helper.make_node("Add", [f"{SILENT}.out", "offset"], ["moved"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["moved", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sum"]),
        helper.make_node("ReduceSum", ["column", "tokens"], ["count"]),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        # Not a MatMul: a product broadcasts over a head's rows, for one head as for one of each text.
        helper.make_node("Mul", ["mean", "head.weight"], ["products"]),
        helper.make_node("ReduceSum", ["products", "last"], ["scores"], keepdims=0),
        helper.make_node("Add", ["scores", "head.bias"], ["logits"]),
    ]
    tokens = [helper.make_tensor_value_info(n, TensorProto.INT64, ("batch", "sequence")) for n in TOKENS]
    shapes = {name: [int(d) if d.isdigit() else d for d in dimensions] for name, dimensions in SLOTS.items()}
    slots = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", "labels"))
    values = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    values += [numpy_helper.from_array(np.array(value), name) for name, value in axes.items()]
    made = helper.make_graph(nodes, "vector", [*tokens, *slots], [logits], values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _layer(x: str, path: str) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("MatMul", [x, f"{path}.weight"], [f"{path}.base"])
    yield helper.make_node("MatMul", [x, path + LORA_A], [f"{path}.low"])
    yield helper.make_node("MatMul", [f"{path}.low", path + LORA_B], [f"{path}.update"])
    yield helper.make_node("Add", [f"{path}.base", f"{path}.update"], [f"{path}.out"])


def tokenizer() -> bytes:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    words = {word: number for number, word in enumerate((*special, *WORDS))}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106  # no password
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(16)
    return str(made.to_str(pretty=True)).encode()


def exported() -> ExportedBase:
    made, work = graph(), WorkFolder()
    runtime, opset = headers.requirements(made)
    digests = headers.split(made, SLOTS, {"task": "text-classification"}, work.path)
    manifest = BaseManifest(
        base_digest=sha256(b"the base of the test vectors"),
        task="text-classification",
        profile=Profile.FP32.value,
        files=digests | written(work.path, {TOKENIZER: tokenizer()}),
        slots=SLOTS,
        max_rank=8,
        independent_rows=True,
        onnxruntime=runtime,
        opset=opset,
        merged={sha256(b"the adapter that was merged"): "LOKR"},
    )
    return ExportedBase(manifest, AdapterInputs.of_tensors(CONFIG, tensors()), work)


def tensors() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        QUERY + LORA_A: (RANKS[QUERY], WIDTH),
        QUERY + LORA_B: (WIDTH, RANKS[QUERY]),
        VALUE + LORA_A: (RANKS[VALUE], WIDTH),
        VALUE + LORA_B: (OUT, RANKS[VALUE]),
        "head.weight": (len(LABELS), OUT),
        "head.bias": (len(LABELS),),
    }
    return {PEFT_PREFIX + name: drawn(name, *shape) for name, shape in shapes.items()}


def write(folder: Path) -> None:
    """Write ``trust.pem``, the bundle, ``expected.json`` and ``cases.json`` into an empty folder."""
    base, values = exported(), tensors()
    digest = sha256(b"".join(values[name].tobytes() for name in sorted(values)))
    write_bundle(folder / "bundle", base, [], key=VENDOR)
    for form in FORMATS:
        parent = None if form == "fp32" else "ab" * 32
        privacy = PRIVACY if form == "fp32" else None  # that of the global one
        source = AdapterSource(form, values, LABELS, VERSION, digest, parent, CONFIG, TEMPERATURE, privacy=privacy)
        signer = OWNER if form == "int4" else VENDOR
        add_adapter(folder / "bundle", base.adapter_inputs, source, key=signer, form=form)
    (folder / TRUST).write_bytes(VENDOR.public.to_pem() + OWNER.public.to_pem())
    _dump(folder / "expected.json", expected(folder, base))
    _dump(folder / "cases.json", list(bundle_cases.cases(folder)))


def expected(folder: Path, base: ExportedBase) -> dict[str, Any]:
    """What a reader finds in the bundle in ``folder``: tensors and ``trust.seen.json``, and what a device answers."""
    read, run = Tokenizer.from_str(tokenizer().decode()), open_base(base.folder, base.manifest.files, SLOTS, True)
    answers: list[dict[str, Any]] = [{"text": text, "ids": read.encode(text).ids, "logits": {}} for text in TEXTS]
    adapters = {}
    for form in FORMATS:
        inputs, seen = opened(folder, form)
        adapters[form] = {"tensors": in_hex(inputs), "seen": seen}
        for answer in answers:
            answer["logits"][form] = run.logits(answer["ids"], run.feeds(inputs)).tolist()
    return {"adapters": adapters, "answers": answers}


def opened(folder: Path, name: str) -> tuple[Tensors, str]:
    """The tensors of an adapter as the native reader finds them, and the ``trust.seen.json`` that it leaves."""
    trust, seen = Trust.open(folder / "bundle"), folder / SEEN
    inputs = trust.adapter(name, trust.bundle.base()).inputs
    try:
        return inputs, seen.read_text(encoding="utf-8")
    finally:
        seen.unlink()
        seen.with_suffix(".lock").unlink(missing_ok=True)


def in_hex(inputs: Tensors) -> dict[str, Any]:
    """Tensors as ``expected.json`` and the reader in JavaScript write them."""
    return {name: {"shape": list(v.shape), "hex": v.astype("<f4").tobytes().hex()} for name, v in inputs.items()}


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        write(Path(name))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(name, FOLDER, ignore=shutil.ignore_patterns("*.lock"))
