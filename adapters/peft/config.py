"""``adapter_config.json`` of a PEFT folder ↔ ``PeftConfig``. Every setting is honored, or refused by name.

Each version of peft adds settings. A setting that is unknown here is therefore accepted only while it is off.
"""

import json
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adapters.peftconfig import PeftConfig
from aggregation.errors import ConfigError, DataError

# Settings that do not change what the stored tensors compute: where peft looks for layers (the tensors show which it
# found), what happens in training, and notes for people and for peft. fan_in_fan_out says that a Conv1D's weight is
# stored transposed; its LoRA matrices are not.
HARMLESS = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("lora_dropout", "inference_mode", "task_type", "auto_mapping", "runtime_config", "eva_config"),
        *("base_model_name_or_path", "revision", "peft_version", "megatron_core", "qalora_group_size"),
        *("init_lora_weights", "bias"),
    }
)
# Other initializations (pissa, olora, corda, loftq, lora_ga) change the weights of the base.
KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})

Settings = dict[str, Any]  # the JSON object


def config_of(settings: Settings) -> PeftConfig:
    """The configuration in an ``adapter_config.json``.

    Raises:
        ConfigError: A method other than LoRA, or a setting that no graph can express; ``about`` names the setting.
        DataError: A field is missing or ill-formed.
    """
    if (kind := settings.get("peft_type")) != "LORA":
        raise ConfigError(
            f"the adapter is of the type {str(kind)[:40]!r}; only LORA can be exported", about="peft_type", value=kind
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
    for name in sorted(settings.keys() - HARMLESS):
        if (value := settings[name]) not in OFF:
            raise ConfigError(
                f"the adapter uses {name[:40]!r}: {value!r:.40}, which cannot be exported: train without it",
                about=name,
                value=value,
            )
    return _config(settings)


def saved_modules(settings: Settings) -> tuple[str, ...]:
    """The names in ``modules_to_save``. Raises DataError if it is not a list of names."""
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise DataError("modules_to_save in adapter_config.json is not a list of names", about="modules_to_save")
    return tuple(saved)


def settings_of(config: PeftConfig, ranks: dict[str, int], saved: list[str], base: str | None) -> Settings:
    """The ``adapter_config.json`` from which peft rebuilds exactly the layers of an adapter.

    Layers are named by their full paths. Those whose rank or alpha differs from the configuration's have a pattern that
    matches them alone, so that the order of patterns does not matter: peft sorts them when it saves.

    Args:
        config: The adapter's.
        ranks: The rank of each adapted layer, by its path.
        saved: The paths of the modules in ``modules_to_save``.
        base: The name of the base that peft notes.
    """
    alphas = {path: config.alpha_of(path) for path in ranks}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": config.use_rslora,
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "rank_pattern": {exactly(path): rank for path, rank in ranks.items() if rank != config.r},
        "alpha_pattern": {exactly(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    }


def exactly(path: str) -> str:
    """The pattern that matches ``path`` and nothing else.

    >>> exactly("layers.0.q_proj")
    '^layers\\\\.0\\\\.q_proj'
    """
    return "^" + re.escape(path)


def _config(settings: Settings) -> PeftConfig:
    targets = settings.get("target_modules") or []
    body = {
        "peft_type": "LORA",
        "r": settings.get("r"),
        "lora_alpha": settings.get("lora_alpha"),
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
