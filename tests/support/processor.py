"""What this processor does with bytes."""

from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of unsigned and signed bytes saturate here, in sums of two, at 16 bits.

    They do on x86 processors without VNNI. ``Profile.WEB_INT8`` has such products.
    """
    made = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "products",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 64]),
            helper.make_tensor_value_info("b", TensorProto.INT8, [64, 64]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 64])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 64), 127, np.int8)})
    return bool((np.asarray(found) != 255 * 127 * 64).any())
