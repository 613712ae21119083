"""``adapter_config.json`` of a PEFT folder ↔ ``PeftConfig``. Every setting is honored, or refused by name.

Each version of peft adds settings. A setting that is unknown here is therefore accepted only while it is off.
"""

import json
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adapters.graphinputs import INPUT_SCALE, layer_of
from adapters.peft.inputs import AdapterInputs
from adapters.peftconfig import PeftConfig
from aggregation.errors import ConfigError, DataError

# Settings that do not change what the stored tensors compute: where peft looks for layers (the tensors show which it
# found), what happens in training, and notes for people and for peft. fan_in_fan_out says that a Conv1D's weight is
# stored transposed; its LoRA matrices are not.
COMMON = frozenset(
    {
        *("peft_type", "modules_to_save", "target_modules", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    }
)
HARMLESS: dict[str, frozenset[str]] = {
    "LORA": COMMON
    | {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "runtime_config", "eva_config", "megatron_core", "qalora_group_size"),
        *("init_lora_weights", "bias"),
    },
    "IA3": COMMON | {"feedforward_modules", "init_ia3_weights"},
    "LN_TUNING": COMMON,
    "BEFT": COMMON | {"init_weights"},
}
# Other initializations (pissa, olora, corda, loftq, lora_ga) change the weights of the base.
KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})

Settings = dict[str, Any]  # the JSON object


def config_of(settings: Settings) -> PeftConfig:
    """The configuration in an ``adapter_config.json``.

    Raises:
        ConfigError: A method or a setting that no graph can express; ``about`` names the setting.
        DataError: A field is missing or ill-formed.
    """
    kind = str(settings.get("peft_type"))
    if kind not in HARMLESS:
        raise ConfigError(
            f"the adapter is of the type {kind[:40]!r}; only {', '.join(HARMLESS)} can be exported",
            about="peft_type",
            value=kind,
        )
    if (bias := settings.get("bias", "none")) != "none":
        raise ConfigError(
            f"the adapter was trained with bias={bias!r}, which cannot be exported; train it with 'none'",
            about="bias",
            value=bias,
        )
    if (start := settings.get("init_lora_weights")) not in KEEPS_THE_BASE:
        raise ConfigError(
            f"the adapter was made with init_lora_weights={start!r}, which changes the base: "
            "convert it to plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)",
            about="init_lora_weights",
            value=start,
        )
    for name in sorted(settings.keys() - HARMLESS[kind]):
        if (value := settings[name]) not in OFF:
            raise ConfigError(
                f"the adapter uses {name[:40]!r}: {value!r:.40}, which cannot be exported: train without it",
                about=name,
                value=value,
            )
    return _config(kind, settings)


def saved_modules(settings: Settings) -> tuple[str, ...]:
    """The names in ``modules_to_save``. Raises DataError if it is not a list of names."""
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise DataError("modules_to_save in adapter_config.json is not a list of names", about="modules_to_save")
    return tuple(saved)


def settings_of(config: PeftConfig, inputs: AdapterInputs, base: str | None) -> Settings:
    """The ``adapter_config.json`` from which peft rebuilds exactly the layers of an adapter.

    Layers are named by their full paths. Those whose rank or alpha differs from the configuration's have a pattern that
    matches them alone, so that the order of patterns does not matter: peft sorts them when it saves.

    Args:
        config: The adapter's.
        inputs: The adapter's.
        base: The name of the base that peft notes.
    """
    settings: Settings = {
        "peft_type": config.peft_type,
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": [slot.path for slot in inputs.saved] or None,
    }
    if config.peft_type == "LORA":
        return settings | _lora_settings(config, [slot.path for slot in inputs.loras])
    settings["target_modules"] = sorted(set(map(layer_of, inputs.vectors)))
    if config.peft_type == "IA3":
        settings["feedforward_modules"] = [layer_of(name) for name in inputs.vectors if name.endswith(INPUT_SCALE)]
    return settings


def _lora_settings(config: PeftConfig, paths: list[str]) -> Settings:
    ranks = {path: config.rank_of(path) for path in paths}
    alphas = {path: config.alpha_of(path) for path in paths}
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": config.use_rslora,
        "target_modules": sorted(ranks),
        "rank_pattern": {exactly(path): rank for path, rank in ranks.items() if rank != config.r},
        "alpha_pattern": {exactly(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    }


def exactly(path: str) -> str:
    """The pattern that matches ``path`` and nothing else.

    >>> exactly("layers.0.q_proj")
    '^layers\\\\.0\\\\.q_proj'
    """
    return "^" + re.escape(path)


def _config(kind: str, settings: Settings) -> PeftConfig:
    targets = settings.get("target_modules") or []
    none = None if kind == "LORA" else 0
    body = {
        "peft_type": kind,
        "r": settings.get("r", none),
        "lora_alpha": settings.get("lora_alpha", none),
        "target_modules": sorted(targets) if isinstance(targets, list) else [targets],
        "rank_pattern": _pairs(settings, "rank_pattern"),
        "alpha_pattern": _pairs(settings, "alpha_pattern"),
        "use_rslora": settings.get("use_rslora", False),
    }
    try:
        return TypeAdapter(PeftConfig).validate_json(json.dumps(body), strict=True)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"adapter_config.json: {field}: {first['msg']}", about=field.partition(".")[0]) from error


def _pairs(settings: Settings, name: str) -> list[tuple[str, Any]]:
    patterns = settings.get(name) or {}
    if not isinstance(patterns, dict):
        raise DataError(f"{name} in adapter_config.json is not an object", about=name)
    return list(patterns.items())
