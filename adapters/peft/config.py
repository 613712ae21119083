"""``adapter_config.json`` of a PEFT folder ↔ ``PeftConfig``. Every setting is honored, or refused by name.

peft adds settings with every version. So what is unknown here is accepted only while it is switched off.
"""

import json
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adapters.peftconfig import PeftConfig
from aggregation.errors import ConfigError, DataError

# They change nothing in what the stored tensors compute: where peft looks for layers (the tensors tell which it found),
# what happens in training, and what is told to people and to peft itself. A weight of a Conv1D lies turned
# (fan_in_fan_out), but not the LoRA matrices beside it.
HARMLESS = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("lora_dropout", "inference_mode", "task_type", "auto_mapping", "runtime_config", "eva_config"),
        *("base_model_name_or_path", "revision", "peft_version", "megatron_core", "qalora_group_size"),
        *("init_lora_weights", "bias"),
    }
)
# The others (pissa, olora, corda, loftq, lora_ga) change the base's weights when the adapter is made.
STARTS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})

Config = dict[str, Any]


def method_of(config: Config) -> PeftConfig:
    """The method of an ``adapter_config.json``.

    Raises:
        ConfigError: Another method than LoRA, or a setting that no graph can express; the message names it.
        DataError: A field is missing or ill-formed.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise ConfigError(f"the adapter is of the type {str(kind)[:40]!r}; only LORA can be exported")
    if (bias := config.get("bias", "none")) != "none":
        raise ConfigError(f"the adapter was trained with bias={bias!r}, which cannot be exported; train it with 'none'")
    if (start := config.get("init_lora_weights")) not in STARTS_BESIDE_THE_BASE:
        raise ConfigError(
            f"the adapter was made with init_lora_weights={start!r}, which changes the base: "
            "convert it to plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    for name in sorted(config.keys() - HARMLESS):
        if config[name] not in OFF:
            raise ConfigError(
                f"the adapter uses {name[:40]!r}: {config[name]!r:.40}, which cannot be exported: train without it"
            )
    return _method(config)


def saved_modules(config: Config) -> tuple[str, ...]:
    """The names in ``modules_to_save``. Raises DataError if it is no list of names."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise DataError("modules_to_save in adapter_config.json is not a list of names")
    return tuple(saved)


def config_of(method: PeftConfig, ranks: dict[str, int], saved: list[str], base: str | None) -> Config:
    """The ``adapter_config.json`` with which peft rebuilds exactly the layers of an adapter.

    Layers are named by their full paths, and those that differ from the method's rank or alpha by patterns that match
    them alone: so nothing hangs on the order of patterns, which peft loses when it saves (it sorts them).

    Args:
        method: Of the adapter.
        ranks: The rank of each adapted layer, by its path.
        saved: The paths of the modules trained whole.
        base: What peft shall note as the base's name.
    """
    alphas = {path: method.alpha_of(path) for path in ranks}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": method.r,
        "lora_alpha": method.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": method.use_rslora,
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "rank_pattern": {exactly(path): rank for path, rank in ranks.items() if rank != method.r},
        "alpha_pattern": {exactly(path): alpha for path, alpha in alphas.items() if alpha != method.lora_alpha},
    }


def exactly(path: str) -> str:
    """The pattern that matches ``path`` and nothing else."""
    return "^" + re.escape(path)


def _method(config: Config) -> PeftConfig:
    targets = config.get("target_modules") or []
    body = {
        "peft_type": "LORA",
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": sorted(targets) if isinstance(targets, list) else [targets],
        "rank_pattern": _pairs(config, "rank_pattern"),
        "alpha_pattern": _pairs(config, "alpha_pattern"),
        "use_rslora": config.get("use_rslora", False),
    }
    try:
        return TypeAdapter(PeftConfig).validate_json(json.dumps(body), strict=True)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise DataError(f"adapter_config.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _pairs(config: Config, name: str) -> list[tuple[str, Any]]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise DataError(f"{name} in adapter_config.json is not an object")
    return list(patterns.items())
