"""A folder of AdapterHub's library ``adapters`` → a bottleneck adapter: ``double_seq_bn`` (Houlsby et al. 2019) or
``seq_bn`` (Pfeiffer et al. 2020), of models whose layers are named as BERT's. Every setting is honored, or refused."""

import re
from typing import Any

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.graphinputs import DOWN, PEFT_PREFIX
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import Method, PeftConfig

WEIGHTS, HEAD, PICKLE = "adapter.safetensors", "model_head.safetensors", "pytorch_adapter.bin"
TENSOR = re.compile(r"(?P<site>.+\.output)\.adapters\.[^.]+\.adapter_(?P<part>down\.0|up)\.(?P<kind>weight|bias)")
# Settings that do not change what the stored tensors compute, and those that a slot takes with one value only.
HARMLESS = {
    *("mh_adapter", "output_adapter", "reduction_factor", "leave_out", "dropout", "stochastic_depth", "learn_phm"),
    *("init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "hypercomplex_nonlinearity"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule"),
    *("phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank"),
}
FIXED = {"original_ln_after": True, "residual_before_ln": True}
METHODS: dict[str, Method] = dict.fromkeys(("swish", "silu"), "BOTTLENECK")
METHODS |= {"relu": "BOTTLENECK_RELU", "gelu": "BOTTLENECK_GELU"}
HONORED = {"non_linearity", "original_ln_before", "scaling"}


def from_adapterhub(stated: object, tensors: Tensors, head: Tensors) -> tuple[PeftConfig, Tensors]:
    """Return configuration and tensors, under peft's names, of an adapter. ``stated``: the table ``config`` of
    ``adapter_config.json``; ``head``: the tensors of a head, by name. Raises ConfigError: a setting that no slot can
    express; DataError: a tensor is of another kind of adapter."""
    if not isinstance(stated, dict):
        raise DataError("config in adapter_config.json is not a table: save the adapter again", about="config")
    settings: dict[str, Any] = stated
    for name in sorted(settings.keys() - HARMLESS - HONORED | FIXED.keys()):
        if (value := settings.get(name)) not in ((FIXED[name],) if name in FIXED else (None, False)):
            raise _refused(name, value)
    if (method := METHODS.get(str(activation := settings.get("non_linearity")))) is None:
        raise _refused("non_linearity", activation)
    if type(scaling := settings.get("scaling", 1.0)) is not float:  # it may be learned, or one for each channel
        raise _refused("scaling", scaling)
    layer = "LayerNorm" if settings.get("original_ln_before") else "dense"
    result = {PEFT_PREFIX + name: value for name, value in head.items()}
    sites = set[str]()
    for name, value in tensors.items():
        if not (match := TENSOR.fullmatch(name)):
            reason = f"tensor {name[:80]!r} is not of a bottleneck adapter in a model with BERT's names: train another"
            raise DataError(reason, about=name[:80])
        part = match["part"].removesuffix(".0")
        factor = np.float32(scaling if part == "up" else 1.0)
        value = value.T if match["kind"] == "weight" else value[np.newaxis]
        ending = part if match["kind"] == "weight" else f"{part}_bias"
        sites.add(site := f"{match['site']}.{layer}")
        result[f"{PEFT_PREFIX}{site}.{method.lower()}_{ending}"] = np.ascontiguousarray(value * factor)
    ranks = {value.shape[1] for name, value in result.items() if name.endswith(DOWN) and value.ndim == 2}
    if len(ranks) != 1:
        reason = f"the adapter has the ranks {sorted(ranks)}, and may have one: train with one reduction_factor"
        raise ConfigError(reason, about="reduction_factor")
    return PeftConfig(method, ranks.pop(), 0, tuple(sorted(sites))), result


def _refused(name: str, value: object) -> ConfigError:
    reason = f"AdapterHub's adapter uses {name[:40]}: {value!r:.40}, which has no slot: train without it"
    return ConfigError(reason, about=name)
