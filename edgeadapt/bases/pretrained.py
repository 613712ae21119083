"""A base's own model: the one module in which transformers opens files that others made.

Any defect ends in one line, a ConfigError. Code that comes with a base never runs. Weights that are missing are
refused, where transformers would draw random ones.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from aggregation.errors import ConfigError
from edgeadapt.bases.base import WEIGHTS, Base
from edgeadapt.bases.marks import Marks
from edgeadapt.bases.pictureencoder import PictureEncoder
from edgeadapt.bases.readers import media_of, open_reader
from edgeadapt.bases.soundencoder import SpeechEmbedding
from edgeadapt.bases.windowencoder import RandomConvolutions
from edgeadapt.formats.graphinputs import in_modules

LONGEST = 2**24  # tokens of a text; a table of positions is as long, whatever the file of weights holds
MAX_REASON = 200  # characters of a message of transformers


def configuration(base: Base) -> Any:
    """Read ``config.json`` with transformers. Raises ConfigError: it is damaged, of an unknown architecture, or states
    sizes that the weights cannot have."""
    try:
        config = AutoConfig.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
        tensors = 0
        for path in base.weight_files:
            with safe_open(path, "np") as file:
                tensors += len(file.keys())
        layers, length = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "max_position_embeddings"))
        if layers > tensors or length > LONGEST:
            reason = f"{layers} layers of {tensors} tensors, for texts of {length} tokens, cannot be right"
            raise ConfigError(reason, about="config.json")
        if not isinstance(config.architectures or [], list):
            reason = f"architectures are not a list: {config.architectures!r}"
            raise ConfigError(reason, about="config.json")
    except Exception as error:  # of many classes, with no common base
        raise _refusal(base, error) from error
    return config


def load(
    base: Base, kind: Any, num_labels: int | None = None, saved: Sequence[str] = (), offload: Path | None = None
) -> Any:
    """Load the base as transformers' class ``kind`` (``AutoModel``, say), in float32 and evaluation mode.

    Args:
        num_labels: Rows of the head, where they are not the base's own.
        saved: As peft's ``modules_to_save``: modules that every adapter brings, so that the base may lack their weights
            or have them in another size.
        offload: A new folder, for a model that may be larger than memory: its layers read their weights when they
            compute, from the base or from there, and are on the device "meta" otherwise (``loaded``).

    Raises ConfigError as ``configuration``; the weights are damaged, or some that change an answer are missing or of
    another size.
    """
    config = configuration(base)
    if num_labels is not None:
        config.num_labels = num_labels
    transformers_logging.disable_progress_bar()
    level, placing = transformers_logging.get_verbosity(), logging.getLogger("accelerate.big_modeling")
    transformers_logging.set_verbosity_error()  # or it prints tables of missing weights
    placing.disabled = True  # or it says that some are not in memory
    places: dict[str, Any] = {}
    if offload:
        with torch.device("meta"):
            model = kind.from_config(config)
        places = {"device_map": dict(_places(model, "")), "offload_folder": str(offload)}
    try:
        model, info = kind.from_pretrained(
            base.folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=num_labels is not None,  # those that no adapter brings are refused below
            **places,
        )
        lacking = {*info["missing_keys"], *(row[0] for row in info["mismatched_keys"])}
        if missing := sorted(name for name in lacking if not in_modules(name, saved)):
            _check_unused(model.eval(), missing)
    except Exception as error:  # as above
        raise _refusal(base, error) from error
    finally:
        transformers_logging.set_verbosity(level)
        placing.disabled = False
    return model.eval()


def loaded(module: nn.Module) -> AbstractContextManager[object]:
    """Give the own parameters of ``module`` their values within the block, whatever ``load`` did with them."""
    from accelerate.utils import align_module_device

    aligned: AbstractContextManager[object] = align_module_device(module)
    return aligned


def parameter_shapes(base: Base, kind: Any, num_labels: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the base as transformers' class ``kind``, or as ``encoder`` of files.
    Raises ConfigError as ``configuration``, or transformers has no such class for the architecture."""
    config = configuration(base)
    config.num_labels = num_labels
    if media_of(base.folder):  # whose layers are not all those of transformers' class
        return {name: tuple(parameter.shape) for name, parameter in encoder(base).named_parameters()}
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except Exception as error:  # as in ``configuration``
        raise _refusal(base, error) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def layer_names(model: nn.Module) -> str:
    """Name a model's linear layers, for messages about a name that it lacks."""
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if is_linear(module)}
    return ", ".join(sorted(names))


def is_linear(module: nn.Module) -> bool:
    """Check whether ``module`` computes ``x W^T + b``: a Linear, GPT-2's Conv1D, or a family's own (FalconLinear)."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    # An attention of torch's own reads this one's weight without calling it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    x = torch.linspace(-1, 1, module.in_features)[None]
    with torch.no_grad():
        computed = module(x)
    with torch.no_grad(), loaded(module):
        expected = nn.functional.linear(x, module.weight, module.bias)
    return isinstance(computed, Tensor) and torch.allclose(computed, expected, rtol=1e-4, atol=1e-5)


def encoder(base: Base) -> Any:
    """Load the base as what turns tokens into states, a ``MediaEncoder`` if it reads files. Raises ConfigError as
    ``load``."""
    model = load(base, AutoModel)
    if not media_of(base.folder):
        if marks := Marks.of(model.config):
            model.register_forward_pre_hook(marks, with_kwargs=True)
        return model
    try:
        reader = tokenizer(base)
        hears = isinstance(model, SpeechEmbedding | RandomConvolutions)
        return model.reading(reader) if hears else PictureEncoder(model, reader)
    except Exception as error:  # as in ``configuration``
        raise _refusal(base, error) from error


def tokenizer(base: Base) -> Any:
    """Open the base's ``edgeadapt.bases.readers.Reader``. Raises ConfigError: it is damaged."""
    try:
        return open_reader((base.folder / "tokenizer.json").read_bytes())
    except Exception as error:  # tokenizers raises plain ones
        raise _refusal(base, error) from error


def _places(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(module, nn.ModuleList):
        yield path, "disk"
    elif not any(isinstance(child, nn.ModuleList) for child in module.modules()):
        yield path, "cpu"
    else:
        within = f"{path}." if path else ""
        yield from ((within + name, "cpu") for name, _ in module.named_parameters(recurse=False))
        yield from ((within + name, "cpu") for name, _ in module.named_buffers(recurse=False))
        for name, child in module.named_children():
            yield from _places(child, within + name)


def _check_unused(model: Any, missing: list[str]) -> None:
    """Check that no missing weights change an answer; some bases lack a pooler, which nothing here reads."""
    state, generator = model.state_dict(), torch.Generator().manual_seed(0)
    answers: list[Tensor] = []
    with torch.no_grad():
        for size in (1, 0):  # not NaN, which an attention kernel may take for padding
            for name in missing:
                state[name].copy_(size * torch.randn(state[name].shape, generator=generator))
            answers.append(model(**_asked(model))[0])
    if not torch.equal(*answers):
        reason = f"{WEIGHTS} lacks {len(missing)} of its tensors, such as {missing[0]!r}, and no adapter brings them: "
        reason += "take the base of the adapter's training, or train them with it (modules_to_save)"
        raise ConfigError(reason, about=WEIGHTS)


def _asked(model: Any) -> dict[str, Tensor]:
    if model.main_input_name != "pixel_values":
        return {"input_ids": torch.arange(1, 4)[None]}
    side = getattr(model.config, "image_size", 64)
    shape = (1, model.config.num_channels, *(side if isinstance(side, list | tuple) else (side, side)))
    return {"pixel_values": torch.linspace(-1, 1, math.prod(shape)).view(shape)}


def _refusal(base: Base, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    about = error.about if isinstance(error, ConfigError) else "base"
    return ConfigError(f"the base in {base.folder} cannot be opened: {reason[:MAX_REASON]}", about=about)


def chat_template(base: Base) -> Callable[[list[dict[str, str]], bool], str] | None:
    """Return the function that renders messages by the base's chat template; None if it has none. It maps messages,
    each with ``role`` and ``content``, and whether an answer shall follow, to the text of the prompt."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many classes, with no common base
        raise _refusal(base, error) from error
    if not tokenizer.chat_template:
        return None

    def render(messages: list[dict[str, str]], answer: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        return text

    return render


def end_token(model: Any) -> int:
    """Return the token that ends a text of a language model. Raises ConfigError if it names none."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return int(ids[0] if isinstance(ids, list) else ids)
    raise ConfigError("nothing says which token ends a text; state eos_token_id in config.json", about="eos_token_id")
