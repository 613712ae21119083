"""A frozen model with an adapter of one of peft's methods, ready to be trained: the one module that lets peft build it.
A coordinator names the configuration, so peft gets one of its own type with the fields that ``require_trainable``
checked and no others: none makes peft open a file, import a module or draw in weights of another model."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import constants
from torch import nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.bases.readers import media_of
from edgeadapt.formats.graphinputs import DOWN, ENDINGS, PROMPT
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.peftconfig import TRAINABLE, Method, MethodName, PeftConfig, layer_number, require_trainable
from edgeadapt.methods.bottleneck import BottleneckConfig
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.methods.peft.methods import COPIES

# ``client.training.torchengine`` puts the base's biases back where it disables an adapter.
warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
KINDS: Mapping[MethodName, Method] = {
    "lora": "LORA",
    "rslora": "LORA",
    "dora": "LORA",
    "adalora": "ADALORA",
    "loha": "LOHA",
    "vera": "VERA",
    "ia3": "IA3",
    "ln_tuning": "LN_TUNING",
    "beft": "BEFT",
    **{"bottleneck": "BOTTLENECK", "bottleneck_relu": "BOTTLENECK_RELU", "bottleneck_gelu": "BOTTLENECK_GELU"},
    "prompt_tuning": "PROMPT_TUNING",
    "prefix_tuning": "PREFIX_TUNING",
}
NAMED: Mapping[str, Mapping[str, list[str]]] = {  # method → architecture → the modules that peft adapts by default
    "LORA": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "ADALORA": constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    "LOHA": constants.TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
    "VERA": constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
    "IA3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    "BEFT": constants.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING,
}

# The layers that end attention and feed-forward block, which Houlsby et al. 2019 adapt.
ENDS = (("output.dense",), ("o_proj", "down_proj"), ("out_lin", "lin2"), ("attn.c_proj", "mlp.c_proj"))
# Projections to queries and values, which Hu et al. 2021 adapt, as architectures name them that peft has no names for;
# the last layer of a convolutional network (``PictureEncoder``).
PROJECTIONS = (
    *(("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"), ("qkv_proj",), ("Wqkv",)),
    ("layer.1.dense",),
)


def adapted(model: nn.Module, config: PeftConfig, *, heads: Sequence[str] = (), task: str | None = None) -> PeftModel:
    """Return a frozen model with a fresh adapter, in evaluation mode: every parameter frozen but the adapter's.
    ``heads`` names the modules that are trained in full; ``task`` is peft's task type, which virtual tokens need.
    Raises ConfigError as ``require_trainable`` and ``_require_kinds``."""
    require_trainable(config)
    _require_kinds(model, config)
    targets = _targets(model, config)
    with warnings.catch_warnings():  # of what peft cannot do with a module, merging for example
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias term", UserWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        wrapped = get_peft_model(model, _peft_config(config, targets, heads, task)).eval()
    for name, value in wrapped.named_parameters():
        if name.endswith(COPIES):
            value.requires_grad_(False)
    return wrapped


def configuration(  # noqa: PLR0913  # each by name, as the command that passes them has them
    base: Base,
    method: MethodName = "lora",
    *,
    rank: int = 8,
    alpha: int = 16,
    targets: Sequence[str] = (),
    feedforward: Sequence[str] = (),
    virtual_tokens: int = 20,
    bias: Literal["none", "all", "lora_only"] = "none",
    layers: int = 0,
) -> PeftConfig:
    """Return the configuration of an adapter that is trained from the start.

    Args:
        alpha: The factor of the update is alpha / rank, of rsLoRA alpha / sqrt(rank); VeRA has none.
        targets: Names of the modules that are adapted. None: those that peft names for the base's architecture, or of
            LoRA the first of ``PROJECTIONS`` that the base has; of LayerNorm tuning, all normalizations.
        feedforward: Those of IA³'s targets whose input is scaled. None, without targets: those that peft names.
        layers: Only the targets in so many of the last layers are adapted; 0: in all.

    Raises ConfigError: the base cannot be opened, peft names no modules for it, or as ``require_trainable``."""
    kind = KINDS[method]
    reads = TRAINABLE[kind]
    fields: dict[str, Any] = {"r": rank if "r" in reads else 0, "lora_alpha": alpha if "lora_alpha" in reads else 0}
    fields["bias"] = bias
    if kind == "LORA":
        fields |= {"use_rslora": method == "rslora", "use_dora": method == "dora"}
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        fields["num_virtual_tokens"] = virtual_tokens
    elif not targets:
        architecture = pretrained.configuration(base).model_type
        targets = _norms(base) if kind == "LN_TUNING" else _named(kind, architecture, base)
        if kind == "IA3":
            feedforward = feedforward or constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[architecture]
    if layers and kind not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        numbers = {number for path in _matrices(base) if (number := layer_number(f"base.{path}")) is not None}
        fields["layers_to_transform"] = tuple(sorted(numbers)[-layers:])
    config = PeftConfig(kind, target_modules=tuple(targets), feedforward_modules=tuple(feedforward), **fields)
    require_trainable(config)
    return config


def _named(kind: str, architecture: str, base: Base) -> Sequence[str]:
    usual = NAMED.get(kind, {}).get(architecture, ())
    if usual and not media_of(base.folder):  # peft's names of image models are those of older classes
        return usual
    paths = [f".{path}" for path in _matrices(base)]
    for names in PROJECTIONS if kind == "LORA" else ENDS if kind.lower() in ENDINGS else ():
        if all(any(path.endswith(f".{name}.weight") for path in paths) for name in names):
            return names
    reason = f"peft names no modules of {architecture!r} for {kind}; name them with targets"
    raise ConfigError(reason, about="target_modules")


def _matrices(base: Base) -> list[str]:
    shapes = pretrained.parameter_shapes(base, AutoModel, 2)
    return [name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")]


def _norms(base: Base) -> list[str]:
    """Name a base's normalizations: the modules whose weight has one dimension."""
    shapes = pretrained.parameter_shapes(base, AutoModel, 2)
    paths = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 1]
    return sorted({path.rpartition(".")[2] for path in paths if f"{path}.weight" in shapes})


def tensors(model: PeftModel) -> Tensors:
    state = get_peft_model_state_dict(model)
    kept = {name: value for name, value in state.items() if not name.endswith(COPIES)}
    return {name: value.detach().to(torch.float32).numpy().copy() for name, value in kept.items()}


def load(model: PeftModel, adapter: Mapping[str, Floats]) -> None:
    """Set the adapter's values. The caller has checked them against the layout."""
    set_peft_model_state_dict(model, {name: torch.from_numpy(np.array(value)) for name, value in adapter.items()})


def initial(model: PeftModel, generator: torch.Generator) -> Tensors:
    """Draw the adapter of day one: it changes nothing where the method has such values, which then are peft's own.

    That is B = 0 and A as its paper draws it, scales of 1, biases of 0 that are added to the base's, the base's own
    normalizations and biases where they are replaced and, of DoRA, the norms of its weights. AdaLoRA's singular values,
    one matrix of LoHa's four and VeRA's λ_b are 0, their other matrices as peft draws them, and λ_d is 0.1. Virtual
    tokens begin as tokens of the vocabulary, drawn at random: as their embeddings (Lester et al. 2021) or as the keys
    and values that the base computes for them (Li and Liang 2021)."""
    start = tensors(model)
    for name, value in start.items():
        if ".lora_A." in name:
            start[name] = _uniform(value.shape, 1 / np.sqrt(value.shape[1]), generator)
        elif name.endswith(DOWN):
            start[name] = _uniform(value.shape, 1 / np.sqrt(value.shape[0]), generator)
        elif ".lora_B." in name:
            start[name] = np.zeros_like(value)
        elif name.endswith((".lora_A", ".lora_B")):  # AdaLoRA's
            start[name] = (0.02 * torch.randn(value.shape, generator=generator, dtype=torch.float32)).numpy()
        elif name.endswith((".hada_w1_a", ".hada_w1_b", ".hada_w2_a")):
            start[name] = _uniform(value.shape, 1 / np.sqrt(value.shape[1]), generator)
        elif part_of(name) is Part.FROZEN:
            start[name] = _uniform(value.shape, np.sqrt(6 / value.shape[1]), generator)
        elif name == PROMPT:
            start[name] = _virtual_tokens(model, len(value), generator)
    return start


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Floats:
    draw: Floats = ((2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1) * bound).numpy()
    return draw


def _virtual_tokens(model: PeftModel, count: int, generator: torch.Generator) -> Floats:
    """Return embeddings, ``(count, width)``, or a prefix, ``(count, layers * 2 * heads * width)``, of drawn tokens."""
    base: Any = model.get_base_model()
    table = base.get_input_embeddings()
    drawn = torch.randint(table.num_embeddings, (1, count), generator=generator)
    with torch.no_grad():
        if model.active_peft_config.peft_type != "PREFIX_TUNING":
            rows: Floats = table(drawn)[0].numpy()
            return rows
        cache = base(input_ids=drawn, use_cache=True).past_key_values
        parts = [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]  # (heads, count, width) each
        prefix: Floats = torch.stack(parts).permute(2, 0, 1, 3).reshape(count, -1).numpy()
        return prefix


def _require_kinds(model: nn.Module, config: PeftConfig) -> None:
    """Check that an adapter of this configuration is on layers of the kind that its method adapts. The update of an
    embedding would name the tokens of the examples, and a module that is trained in full may be as large as the base.
    Raises ConfigError: no module bears a target's name, or one that does is of another kind."""
    norm, linear, method = "normalization", "linear layer", config.peft_type
    kinds = [norm, linear] if method.lower() in ENDINGS else [norm] if method == "LN_TUNING" else [linear]
    for target in config.target_modules:
        modules = {path: m for path, m in model.named_modules() if path == target or path.endswith(f".{target}")}
        if not modules:
            reason = f"the base has no module named {target!r}; it has {pretrained.layer_names(model)}"
            raise ConfigError(reason, about="target_modules")
        for path, module in modules.items():
            if (norm if _is_norm(module) else linear if _is_linear(module, config) else "") not in kinds:
                raise ConfigError(
                    f"target_modules name {path}, which is not a {' or '.join(kinds)} but"
                    f" {type(module).__name__}: {config.peft_type} is trained on nothing else, because the update of an"
                    " embedding would show which tokens the examples have; name other modules",
                    about="target_modules",
                )


def _targets(model: nn.Module, config: PeftConfig) -> Sequence[str]:
    """Name what peft adapts: with ``layers_to_transform``, the paths of the targets in these layers, for all methods.
    Raises ConfigError: the model has no target in one of the layers."""
    if not config.layers_to_transform:
        return config.target_modules
    paths = [path for path, _ in model.named_modules() if path.endswith(tuple(f".{t}" for t in config.target_modules))]
    present = {layer_number(path) for path in paths} - {None}
    if odd := sorted(set(config.layers_to_transform) - present):
        reason = f"layers_to_transform names layer {odd[0]}; the base has {len(present)} with these target modules, "
        reason += "counted from 0"
        raise ConfigError(reason, about="layers_to_transform")
    return [path for path in paths if layer_number(path) in config.layers_to_transform]


def _feeding(config: PeftConfig, targets: Sequence[str]) -> list[str]:
    names = config.feedforward_modules
    return [target for target in targets if target in names or target.endswith(tuple(f".{name}" for name in names))]


def _is_linear(module: nn.Module, config: PeftConfig) -> bool:
    """Check for a linear layer, also with transposed weights (of which peft has no BEFT and no LoHa)."""
    return isinstance(module, nn.Linear if config.peft_type in ("BEFT", "LOHA") else nn.Linear | Conv1D)


def _is_norm(module: nn.Module) -> bool:
    """Check that ``module`` has nothing but a weight of one dimension and maybe a bias, as LayerNorm and RMSNorm."""
    state = {name: value.ndim for name, value in module.state_dict().items()}
    return state in ({"weight": 1}, {"weight": 1, "bias": 1})


def _peft_config(config: PeftConfig, targets: Sequence[str], heads: Sequence[str], task: str | None) -> peft.PeftConfig:
    common: dict[str, Any] = {"task_type": task}
    if config.num_virtual_tokens:
        count = config.num_virtual_tokens
        if config.peft_type == "PREFIX_TUNING":
            return peft.PrefixTuningConfig(num_virtual_tokens=count, **common)
        # What P-tuning saves are the embeddings that its encoder returned; these go on as those of prompt tuning.
        return peft.PromptTuningConfig(num_virtual_tokens=count, **common)
    common |= {"target_modules": list(targets), "modules_to_save": list(heads) or None}
    match config.peft_type:
        case "IA3":
            return peft.IA3Config(feedforward_modules=_feeding(config, targets), **common)
        case "LN_TUNING":
            return peft.LNTuningConfig(**common)
        case "BEFT":
            return peft.BeftConfig(**common)
        case "BOTTLENECK" | "BOTTLENECK_RELU" | "BOTTLENECK_GELU":
            return BottleneckConfig(peft_type=config.peft_type, r=config.r, **common)
        case "ADALORA":  # the rank that it begins with is its rank: nothing runs the allocator, so any schedule will do
            rank = config.r
            return peft.AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=config.lora_alpha, total_step=1, **common)
        case "LOHA":
            return peft.LoHaConfig(r=config.r, alpha=config.lora_alpha, **common)
        case "VERA":
            return peft.VeraConfig(r=config.r, save_projection=True, **common)
        case _:
            scaling = {"lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
            return peft.LoraConfig(r=config.r, use_dora=config.use_dora, bias=config.bias, **scaling, **common)
