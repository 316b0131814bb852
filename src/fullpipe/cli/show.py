"""`fullpipe show` says what a model is made of, and where it would be cut."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.cli.options import Only
from fullpipe.cluster.partition import cut
from fullpipe.models.gguf_parts import gguf_parts
from fullpipe.options import ModelOptions, PipelineOptions

if TYPE_CHECKING:
    from fullpipe.models.files import ModelFiles

_DEFAULT_STAGES = 8


def show(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Any model name; see `fullpipe pull`.")],
    model: Annotated[ModelOptions, Only("dtype", "quantization")],
    pipeline: Annotated[PipelineOptions, Only("device")],
    stages: Annotated[
        int | None, typer.Option("--stages", help="Cut into so many stages.", show_default="8")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a model: its shape and vocabulary, what becomes of its weights, and how it would be cut into stages.

    A model that is not here is fetched first. The device need not be there.
    """
    with console.TransferBar() as bar:
        path = hub.resolve(name, progress=bar)
    found = _describe(name, path, stages, model, pipeline.device)
    if as_json:
        console.print_json(found)
    else:
        _print(found)


def _describe(name: str, path: Path, stages: int | None, model: ModelOptions, device: str) -> dict[str, Any]:
    from fullpipe.models.dtypes import pick_dtype
    from fullpipe.models.generation import sampling_of
    from fullpipe.models.tokens.loading import load_tokenizer
    from fullpipe.models.weights import open_model

    files = open_model(path)
    dtype, config = pick_dtype(model.dtype, device, files, model.quantization), files.config
    tokenizer = load_tokenizer(path)
    known = hub.CATALOGUE.get(name.lower())
    return {
        "name": name,
        "path": str(path),
        "family": config.family,
        "num_layers": config.num_layers,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate": config.intermediate,
        "context": config.max_positions,
        "vocab_rows": config.vocab_size,
        "vocab_tokens": tokenizer.vocab_size,
        "eos": {str(i): tokenizer.tokens[i] for i in sorted(tokenizer.eos_ids)},
        "chat_template": tokenizer.template is not None,
        "sampling": dict(sampling_of(path).params),
        "tied_embeddings": config.tied,
        "tensor_types": _tensor_types(path),
        "file_bytes": sum(file.stat().st_size for file in _weight_files(path)),
        "draft": known.draft if known else None,
        "dtype": dtype,
        "forms": _forms(files, dtype, device),
        **_sizes_and_stages(files, dtype, device, stages),
    }


def _forms(files: ModelFiles, dtype: str, device: str) -> list[dict[str, Any]]:
    """What becomes of the tensors of each type: all of them once, as in a single stage."""
    from fullpipe.kernels import load
    from fullpipe.models.forms import Kept, bytes_kept, bytes_stored, kept_tensor

    native, found = load(), dict[tuple[str, Kept], list[int]]()
    for name in files.wanted_shapes():
        kept = kept_tensor(files, name, dtype, device)
        sums = found.setdefault((files.kind(name).name, kept), [0, 0, 0])
        for i, more in enumerate((1, bytes_stored(files, name), bytes_kept(native, files, name, dtype, device))):
            sums[i] += more
    kernels = {"native": f"native ({native.level})" if native else "native", "torch": "torch", "gpu": f"GPU ({device})"}
    return [{"type": kind, "tensors": sums[0], "file_bytes": sums[1], "kept_as": kept.form.name, "how": kept.how,
             "memory_bytes": sums[2], "kernels": kernels[kept.by]}
            for (kind, kept), sums in sorted(found.items(), key=lambda one: -one[1][1])]


def _sizes_and_stages(files: ModelFiles, dtype: str, device: str, stages: int | None) -> dict[str, Any]:
    """Bytes of the parts, and the stages that `cut` makes of them.

    The time of a step over few rows is the time it takes to read the weights, so bytes stand for time; of the
    embedding a step reads single rows, which is nothing.
    """
    from fullpipe.kernels import load
    from fullpipe.models.dtypes import sizes_in
    from fullpipe.models.forms import bytes_kept, kernels_of

    config, size = files.config, sizes_in(files, dtype)
    bytes_of = partial(bytes_kept, load(), files, dtype=dtype, device=device)
    layers = [sum(map(bytes_of, config.layer_shapes(number))) for number in range(config.num_layers)]
    number = min(_DEFAULT_STAGES, config.num_layers) if stages is None else stages
    # As `assembly.stage_ends` cuts them.
    parts = cut([size.layer_bytes] * config.num_layers, size.head_bytes, 0, number)
    shared = config.tied and kernels_of(dtype, device) != "torch"  # a packed head is a copy of its own
    rows = []
    for index, part in enumerate(parts):
        first, last = index == 0, index == len(parts) - 1
        read = sum(layers[part.start : part.stop]) + last * size.head_bytes
        rows.append({
            "stage": index,
            "first_layer": part.start,
            "num_layers": len(part),
            "embedding": first,
            "head": last,
            "weight_bytes": read + (first and not (last and shared)) * size.embedding_bytes,
            "bytes_per_step": read,
        })
    return {
        "layer_bytes": size.layer_bytes,
        "embedding_bytes": size.embedding_bytes,
        "head_bytes": size.head_bytes,
        "kv_bytes_per_token": size.kv_bytes * config.num_layers,
        "stages": rows,
    }


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else gguf_parts(path)


def _tensor_types(path: Path) -> dict[str, int]:
    """How many tensors are stored in each type, the most frequent first."""
    if path.is_dir():
        counts = Counter(kind for file in _weight_files(path) for kind in _safetensors_types(file))
    else:
        from fullpipe.models.gguf_file import read_tensors

        counts = Counter(tensor.kind.name for tensor in read_tensors(path)[1].values())
    return dict(counts.most_common())


def _safetensors_types(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118 - no mapping


def _print(found: dict[str, Any]) -> None:
    from fullpipe.models.generation import Generation

    for label, text in (
        ("model", found["name"]),
        ("path", found["path"]),
        ("family", f"{found['family']}, {found['num_layers']} layers of {found['hidden']}, "
         f"MLP {found['intermediate']}, {found['heads']} heads of {found['head_dim']} "
         f"({found['kv_heads']} key-value heads)"),
        ("context", f"{found['context']:,} tokens, {found['kv_bytes_per_token'] / 1e3:.1f} kB of cache each"),
        ("vocabulary", f"{found['vocab_tokens']:,} tokens in {found['vocab_rows']:,} rows"
         f"{', head tied to the embedding' if found['tied_embeddings'] else ''}"),
        ("ends with", " ".join(found["eos"].values()) or "nothing"),
        ("chat", "yes" if found["chat_template"] else "no template"),
        ("sampling", str(Generation(found["sampling"])) or None),
        ("stored as", f"{_counts(found['tensor_types'])}, {console.megabytes(found['file_bytes'])}"),
        (found["dtype"], f"{console.megabytes(found['layer_bytes'])} a layer, "
         f"{console.megabytes(found['embedding_bytes'])} embedding, "
         f"{console.megabytes(found['head_bytes'])} head"),
        ("draft", found["draft"]),
    ):
        if text is not None:
            typer.echo(f"{label:<11} {text}")
    typer.echo()
    console.print_table(("STORED AS", "TENSORS", "IN THE FILE", "KEPT AS", "", "IN MEMORY", "KERNELS"),
                        [_form_row(form) for form in found["forms"]])
    typer.echo()
    slowest = max(stage["bytes_per_step"] for stage in found["stages"])
    console.print_table(
        ("STAGE", "LAYERS", "AND", "WEIGHTS", "READ PER STEP", "OF SLOWEST"),
        [_stage_row(stage, slowest) for stage in found["stages"]],
    )


def _counts(types: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in types.items())


def _form_row(form: dict[str, Any]) -> tuple[str, ...]:
    return (form["type"], str(form["tensors"]), console.megabytes(form["file_bytes"]), form["kept_as"],
            "" if form["how"] == "as stored" else form["how"], console.megabytes(form["memory_bytes"]), form["kernels"])


def _stage_row(stage: dict[str, Any], slowest: int) -> tuple[str, ...]:
    first, number = stage["first_layer"], stage["num_layers"]
    return (
        str(stage["stage"]),
        f"{first}..{first + number - 1} ({number})" if number else "none",
        " + ".join(part for part in ("embedding", "head") if stage[part]),
        console.megabytes(stage["weight_bytes"]),
        console.megabytes(stage["bytes_per_step"]),
        f"{stage['bytes_per_step'] / slowest:.0%}",
    )
