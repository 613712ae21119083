"""Makes ``tests/vectors/adapterhub`` with AdapterHub's library ``adapters`` 1.3, in an environment of its own:

    pip install adapters torch && python tests/vectors/make_adapterhub.py

A base of random weights, adapters of random weights as ``save_adapter`` writes them, token ids, and the logits of each
adapter for them.
"""

import json
import os
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, SeqBnConfig
from transformers import AutoModelForSequenceClassification, BertConfig

FOLDER = Path(__file__).with_name("adapterhub")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ADAPTERS = {
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "houlsby-gelu": DoubleSeqBnConfig(reduction_factor=8, non_linearity="gelu", scaling=1.5, leave_out=[0]),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
}
IDS = [[3, 14, 15, 9, 26], [5, 35, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    config = BertConfig(vocab_size=75, max_position_embeddings=24, num_labels=3, **SIZES)
    base = AutoModelForSequenceClassification.from_config(config)
    for value in base.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    os.chdir(FOLDER)  # the adapters note the name of the base
    base.save_pretrained("base")
    logits = {}
    for name, kind in ADAPTERS.items():
        model = AutoModelForSequenceClassification.from_pretrained("base").eval()
        adapters.init(model)
        model.add_adapter("task", config=kind)
        model.set_active_adapters("task")
        for path, value in model.named_parameters():
            if ".adapters." in path:
                value.data = 0.5 * torch.randn(value.shape, generator=generator)
        (FOLDER / name).mkdir(exist_ok=True)
        model.save_adapter(str(FOLDER / name), "task", with_head=True, use_safetensors=True)
        with torch.no_grad():
            logits[name] = [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in IDS]
    (FOLDER / "expected.json").write_text(json.dumps({"ids": IDS, "logits": logits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
