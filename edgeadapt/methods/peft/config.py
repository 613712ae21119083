"""``adapter_config.json`` of a PEFT folder ↔ ``PeftConfig``. Every setting is honored, or refused by name. Each version
of peft adds settings, so an unknown setting is accepted only while it is off."""

import json
from typing import Any

from pydantic import ValidationError

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats import jsontext
from edgeadapt.formats.graphinputs import INPUT_SCALE, OFFSET, REPLACED, layer_of
from edgeadapt.formats.peftconfig import BOTTLENECKS, PeftConfig, exactly
from edgeadapt.methods.peft.inputs import AdapterInputs

# Settings that do not change what the stored tensors compute: where peft looks for layers (the tensors show which it
# found), what happens in training, and notes for people and for peft. fan_in_fan_out says that a Conv1D's weight is
# stored transposed; its LoRA matrices are not.
COMMON = frozenset(
    {
        *("peft_type", "modules_to_save", "target_modules", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    }
)
LAYERS = frozenset({"layers_to_transform", "layers_pattern"})
LORA = COMMON | {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", *LAYERS),
    *("lora_dropout", "runtime_config", "eva_config", "megatron_core", "qalora_group_size"),
    *("init_lora_weights", "bias", "lora_bias"),
}
# The sizes are those of the tensors and of the base; encoders of virtual tokens have run when peft saves.
VIRTUAL = COMMON | {
    *("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"),
    *("num_transformer_submodules", "prompt_tuning_init", "prompt_tuning_init_text"),
    *("tokenizer_name_or_path", "tokenizer_kwargs"),
}
HARMLESS: dict[str, frozenset[str]] = {
    "LORA": LORA | {"use_dora"},
    "ADALORA": LORA
    | {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    "LOHA": COMMON
    | {
        *("r", "alpha", "rank_pattern", "alpha_pattern", *LAYERS),
        *("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
    },
    "VERA": COMMON
    | {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias", "init_weights", *LAYERS},
    "IA3": COMMON | {"feedforward_modules", "init_ia3_weights"},
    "LN_TUNING": COMMON,
    "BEFT": COMMON | {"init_weights"},
    **dict.fromkeys(BOTTLENECKS, COMMON | {"r"}),
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL | {"encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"},
    "PREFIX_TUNING": VIRTUAL | {"prefix_projection", "init_weights"},
}
# Other initializations (pissa, olora, corda, loftq, lora_ga) change the weights of the base.
BIASES = ("none", "all", "lora_only", "vera_only")  # which of the base's biases an adapter replaces
KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
# Types that peft merges into a base's weights (export/merge.py).
MERGED = frozenset(
    {
        *("ADALORA", "ADAMSS", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA"),
        *("IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA"),
        *("ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
    }
)
# Settings of LoRA without which it cannot be exported, and with which it can be merged.
MERGEABLE = frozenset({"layer_replication", "target_parameters", "trainable_token_indices"})
VIRTUAL_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # of virtual tokens
# The settings that state rank and alpha; of the other methods there are none.
RANKS = {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha"), "LOHA": ("r", "alpha"), "VERA": ("r", "")}
RANKS |= dict.fromkeys(BOTTLENECKS, ("r", ""))
ALLOCATED = ".lora_E"  # ends the names in AdaLoRA's rank_pattern
MAX_NUMBER = 2**31  # no layer is as wide
REMEDY = "correct it, or save the adapter again with peft"
OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})

Settings = dict[str, Any]  # the JSON object


def config_of(settings: Settings) -> PeftConfig:
    """Read the configuration in an ``adapter_config.json``. Raises ConfigError: a method or a setting that no graph can
    express; ``about`` names the setting; DataError: a field is missing or ill-formed."""
    kind = str(settings.get("peft_type"))
    if kind not in HARMLESS:
        remedy = "merge it into its base with 'edgeadapt base merge'" if kind in MERGED else "train another"
        raise ConfigError(
            f"adapters of the type {kind[:40]!r} have no place in a graph, which takes {', '.join(HARMLESS)}: {remedy}",
            about="peft_type",
        )
    if (bias := settings.get("bias", "none")) not in BIASES:
        reason = f"the adapter was trained with bias={bias!r:.40}; choose among {', '.join(BIASES)}"
        raise ConfigError(reason, about="bias")
    if (start := settings.get("init_lora_weights")) not in KEEPS_THE_BASE:
        reason = f"the adapter was made with init_lora_weights={start!r}, which changes the base: "
        reason += "convert it to plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)"
        raise ConfigError(reason, about="init_lora_weights")
    if (stacks := settings.get("num_transformer_submodules")) not in (None, 1):
        raise ConfigError(
            f"the adapter has virtual tokens for {stacks!r:.40} stacks of layers; only a single stack can be exported",
            about="num_transformer_submodules",
        )
    for name in sorted(settings.keys() - HARMLESS[kind]):
        if (value := settings[name]) not in OFF:
            remedy = ", or merge the adapter into its base with 'edgeadapt base merge'" if name in MERGEABLE else ""
            text = f"the adapter uses {name[:40]!r}: {value!r:.40}, which cannot be exported: train without it{remedy}"
            raise ConfigError(text, about=name)
    return _config(kind, settings)


def check_numbers(settings: Settings) -> None:
    """Check that an adapter of low rank can answer with its rank and alpha; other methods have neither. Raises
    DataError: one of them is missing, not a number, not above 0, or absurdly large."""
    rank, alpha = RANKS.get(str(settings.get("peft_type")), ("", ""))
    for name, types, what in ((rank, (int,), "a whole number"), (alpha, (int, float), "a number")):
        value: Any = settings.get(name)
        if name and not (type(value) in types and 0 < value < MAX_NUMBER):  # false for NaN too
            raise DataError(
                f"{name} in adapter_config.json is {value!r:.40}, not {what} above 0 and below {MAX_NUMBER}: {REMEDY}",
                about=name,
            )


def saved_modules(settings: Settings) -> tuple[str, ...]:
    """Return the names in ``modules_to_save``. Raises DataError if it is not a list of names."""
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise DataError("modules_to_save in adapter_config.json is not a list of names", about="modules_to_save")
    return tuple(saved)


def settings_of(config: PeftConfig, inputs: AdapterInputs, base: str | None, virtual_tokens: int = 0) -> Settings:
    """Write the ``adapter_config.json`` from which peft rebuilds exactly the layers of an adapter.

    Layers are named by their full paths. Those whose rank or alpha differs from the configuration's have a pattern that
    matches them alone, so that the order of patterns does not matter: peft sorts them when it saves. ``base`` is the
    name of the base that peft notes."""
    settings: Settings = {
        "peft_type": config.peft_type,
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": [slot.path for slot in inputs.saved] or None,
    }
    if config.peft_type in RANKS and config.peft_type not in BOTTLENECKS:
        return settings | _low_rank_settings(config, inputs)
    if inputs.virtual:
        # Without a task peft would ignore the virtual tokens.
        task = "SEQ_CLS" if inputs.saved else "CAUSAL_LM"
        return settings | {"task_type": task, "num_virtual_tokens": virtual_tokens, "num_transformer_submodules": 1}
    settings["target_modules"] = sorted(set(map(layer_of, inputs.vectors)))
    if config.r:
        settings["r"] = config.r
    if config.peft_type == "IA3":
        settings["feedforward_modules"] = [layer_of(name) for name in inputs.vectors if name.endswith(INPUT_SCALE)]
    return settings


def _low_rank_settings(config: PeftConfig, inputs: AdapterInputs) -> Settings:
    paths = [slot.path for slot in inputs.loras]
    ranks = {path: config.rank_of(path) for path in paths}
    alphas = {path: config.alpha_of(path) for path in paths}
    rank, alpha = RANKS[config.peft_type]
    settings: Settings = {rank: config.r, "target_modules": sorted(ranks)}
    if config.peft_type == "VERA":
        return settings | {"save_projection": True}
    settings |= {alpha: config.lora_alpha}
    odd = {path: rank for path, rank in ranks.items() if rank != config.r}
    if config.peft_type == "ADALORA":  # peft wants a schedule of ranks, and does not use it to answer
        allocated = {path + ALLOCATED: [at < rank for at in range(config.r)] for path, rank in odd.items()}
        return settings | {"target_r": config.r, "total_step": 1, "rank_pattern": allocated or None}
    settings |= {
        "rank_pattern": {exactly(path): rank for path, rank in odd.items()},
        "alpha_pattern": {exactly(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    }
    if config.peft_type == "LOHA":
        return settings
    replaces = any(name.endswith(REPLACED) for name in inputs.vectors)  # also as VeRA, which became LoRA
    return settings | {
        "lora_dropout": 0.0,
        "bias": config.bias if config.bias != "none" or not replaces else "all",
        "lora_bias": any(name.endswith(OFFSET) for name in inputs.vectors),
        "use_rslora": config.use_rslora,
    }


def _config(kind: str, settings: Settings) -> PeftConfig:
    check_numbers(settings)
    patterns = kind in ("LORA", "LOHA")
    rank, alpha = RANKS.get(kind, ("", ""))
    body = {
        "peft_type": kind,
        "r": settings.get(rank) if rank else 0,
        "lora_alpha": settings.get(alpha) if alpha else 0,
        "target_modules": _listed(settings, "target_modules"),
        "rank_pattern": _pairs(settings, "rank_pattern") if patterns else _allocated(settings, kind),
        "alpha_pattern": _pairs(settings, "alpha_pattern") if patterns else [],
        "use_rslora": settings.get("use_rslora", False) if kind == "LORA" else False,
        "use_dora": settings.get("use_dora", False) if kind == "LORA" else False,
        "bias": settings.get("bias", "none") if kind == "LORA" else "none",
        "feedforward_modules": _listed(settings, "feedforward_modules") if kind == "IA3" else [],
        "num_virtual_tokens": settings.get("num_virtual_tokens", 0) if kind in VIRTUAL_TYPES else 0,
        "layers_to_transform": _layers(settings),
    }
    try:
        return jsontext.decode_as(PeftConfig, json.dumps(body))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        reason = f"{field} in adapter_config.json has {first['input']!r:.40}, which cannot be used ({first['msg']})"
        raise DataError(f"{reason}: {REMEDY}", about=field) from error


def _layers(settings: Settings) -> list[Any]:
    """Return the numbers of the adapted layers. Those of one list of several (``layers_pattern``) show in the tensors
    only."""
    layers = None if settings.get("layers_pattern") else settings.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    return sorted(listed) if all(type(number) is int for number in listed) else listed


def _listed(settings: Settings, name: str) -> list[Any]:
    modules = settings.get(name) or []
    return sorted(modules, key=str) if isinstance(modules, list) else [modules]


def _allocated(settings: Settings, kind: str) -> list[tuple[str, Any]]:
    """Return the ranks that AdaLoRA's allocator left: peft notes which singular values of a layer it kept."""
    pairs = _pairs(settings, "rank_pattern") if kind == "ADALORA" else []
    return [
        (exactly(name.removesuffix(ALLOCATED)), kept.count(True) if isinstance(kept, list) else kept)
        for name, kept in pairs
    ]


def _pairs(settings: Settings, name: str) -> list[tuple[str, Any]]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise DataError(f"{name} in adapter_config.json is not an object", about=name)
    return list(patterns.items())
