"""The error of averaging LoRA's factors: how far the product of two means is from the mean of the products.

A coordinator cannot measure it, because it knows sums only. A simulation can: it has every client's texts.
"""

import math
from collections.abc import Iterable

import numpy as np

from adapters.layout import Tensors

A, B = ".lora_A.", ".lora_B."


def aggregation_error(trained: Iterable[tuple[Tensors, float]]) -> float:
    """‖mean(B A) - mean(B) mean(A)‖ / ‖mean(B A)‖ over the devices of a round, Frobenius norms over all layers.

    It is 0 where all devices have the same A or the same B. Otherwise the global update is off by that share of the
    update that the devices' mean would be (Sun et al. 2024, section 3.2).

    Args:
        trained: Each device's adapter after its training, and its weight in the mean; some weight is above 0. Tensors
            are float32 and named as peft names them. Adapters are read one after the other.

    Returns:
        At least 0; NaN if the mean update is zero, as without LoRA.
    """
    total, means, products = 0.0, dict[str, np.ndarray](), dict[str, np.ndarray]()
    for tensors, weight in trained:
        total += weight
        for name, b in tensors.items():
            if B not in name:
                continue
            a = tensors[name.replace(B, A)]
            for sums, key, value in ((means, name, b), (means, name.replace(B, A), a), (products, name, b @ a)):
                sums[key] = sums.get(key, 0.0) + weight * value.astype(np.float64)
    pairs = [
        (product / total, (means[name] / total) @ (means[name.replace(B, A)] / total))
        for name, product in products.items()
    ]
    size = math.sqrt(sum(float(np.square(exact).sum()) for exact, _ in pairs))
    off = math.sqrt(sum(float(np.square(exact - mean).sum()) for exact, mean in pairs))
    return off / size if size else math.nan
