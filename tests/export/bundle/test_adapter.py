"""Adapter files: deterministic, exact to their format, refused when damaged; and completed for the base's slots."""

import numpy as np
import pytest
from peft import PeftModel

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import check_slots, to_inputs
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.classifier import tensors
from edgeadapt.methods.peft.inputs import AdapterInputs
from export.bundle.adapter import completed, decode, encode
from export.onnx.exported import ExportedBase
from export.parity.compare import OnnxRunner
from tests.support import refused


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 0.0), ("fp16", 2**-10), ("int8", 1 / 127), ("int4", 1 / 7)])
def test_a_file_holds_the_tensors_to_the_precision_of_its_format(
    model: PeftModel, exported: ExportedBase, form: Format, tolerance: float
) -> None:
    blob, values = encode(tensors(model), exported.adapter_inputs, form), tensors(model)
    assert encode(dict(reversed(values.items())), exported.adapter_inputs, form) == blob
    found = decode(blob, form)
    for name, value in to_inputs(tensors(model), exported.adapter_inputs.scaling).items():
        assert np.abs(found[name] - value).max() <= tolerance * np.abs(value).max()


def test_a_missing_and_an_unknown_tensor_are_refused(model: PeftModel, exported: ExportedBase) -> None:
    values = tensors(model)
    first = next(iter(values))
    with refused(DataError, first.removeprefix("base_model.model.")):
        encode({name: value for name, value in values.items() if name != first}, exported.adapter_inputs)
    with refused(DataError, "extra"):
        encode(values | {"extra": np.ones(1, np.float32)}, exported.adapter_inputs)


def test_nan_is_not_exported(model: PeftModel, exported: ExportedBase) -> None:
    values = tensors(model)
    first = next(iter(values))
    values[first][0, 0] = np.nan
    with refused(DataError, first.removeprefix("base_model.model.")):
        encode(values, exported.adapter_inputs)


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_layers_that_an_adapter_does_not_adapt_get_an_empty_pair(
    model: PeftModel, exported: ExportedBase, form: Format
) -> None:
    method = PeftConfig("LORA", 4, 8, ("query",))
    values = {name: value for name, value in tensors(model).items() if ".value." not in name}
    full, found = completed(values, AdapterInputs.of_tensors(method, values), exported.manifest.slots)
    inputs = decode(encode(full, found, form), form)
    assert check_slots(inputs, exported.manifest.slots)["labels"] == 4
    assert {value.size for name, value in inputs.items() if ".value." in name} == {0}
    loaded = tensors(model) | {
        name: np.zeros_like(value) for name, value in tensors(model).items() if ".value." in name
    }
    expected, answer = (
        OnnxRunner.open(exported.folder, exported.manifest).classify(["lock the door"], x)
        for x in (decode(encode(loaded, exported.adapter_inputs, form), form), inputs)
    )
    np.testing.assert_allclose(answer, expected, atol=1e-6)
