"""The memory that the export of a language model takes, measured in a process of its own."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open

LIBRARIES = 700e6  # bytes: of the process before it reads a weight, and of what it imports later
A_PARAMETER = 6  # bytes at most; the float32 model alone takes 4

CHILD = """
import sys
from edgeadapt.bases.base import find_base
from export.causal import export_causal
from export.onnx.exported import Profile
exported = export_causal(find_base(sys.argv[1]), ("q_proj", "v_proj"), Profile.NATIVE_INT8)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss would count the parent
print(int(peak.split()[1]) * 1024, exported.size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_the_export_of_a_large_base_takes_few_bytes_a_parameter(make_lm: Any) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    base = make_lm("llama", **sizes, **heads, dtype=torch.bfloat16)
    with safe_open(base.weight_files[0], "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # it is no dictionary
    assert 1.2e8 < parameters < base.weight_bytes / 2
    command = [sys.executable, "-c", CHILD, str(base.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > parameters
    assert peak < LIBRARIES + A_PARAMETER * parameters
