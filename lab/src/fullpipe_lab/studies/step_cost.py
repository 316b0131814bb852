"""What a decode step costs, side by side with transformers: same weights, same context, same thread, same run.

    python -m fullpipe_lab.studies.step_cost [--model PATH] [--context 128] [--rows 1,8] [--dtype bfloat16]
        [--repeats 40] [--write]

Every sample is one step through all layers and the head: ours with a pool of slots, transformers' with its own
DynamicCache (cropped back, outside the clock, after each step). The two alternate, so that whatever else the machine
does hits both. `--write` keeps the receipt in lab/receipts/step_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Qwen2Config

from fullpipe.hub import resolve
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.files import ModelFiles
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt

Run = Callable[[], None]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    files = open_model(args.model or resolve("smollm2-135m"))
    ours = DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=dtype)
    theirs = reference_model(files, dtype)
    tokens = torch.randint(files.config.vocab_size, (args.context + max(args.rows),),
                           generator=torch.Generator().manual_seed(0))
    results = [compare(ours, theirs, tokens, args.context, rows, args.repeats) for rows in args.rows]
    for result in results:
        print(f"{result['rows']:3d} rows: ours {result['ours_median_ms']:.1f} ms, transformers "
              f"{result['transformers_median_ms']:.1f} ms, {result['ratio']:.2f} times faster")
    samples = [{"rows": result["rows"], "ms": result.pop("samples_ms")} for result in results]
    setting = {"model": files.path.name, "dtype": args.dtype, "threads": args.threads, "context": args.context,
               "packed": ours.packed, "steps": results}
    if args.write:
        save_receipt(study_receipt("step_cost", setting, samples), STUDIES / "step_cost.json")


def compare(ours: DecoderSlice, theirs: PreTrainedModel, tokens: torch.Tensor, context: int, rows: int,
            repeats: int) -> dict[str, Any]:
    """Alternate the two; medians and raw samples in milliseconds."""
    steps = {"ours": our_step(ours, tokens, context, rows), "transformers": their_step(theirs, tokens, context, rows)}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 3):
        for name, (step, undo) in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 3:
                samples[name].append(round((time.perf_counter() - start) * 1e3, 3))
            undo()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {"rows": rows, "ours_median_ms": medians["ours"], "transformers_median_ms": medians["transformers"],
            "ratio": round(medians["transformers"] / medians["ours"], 3), "samples_ms": samples}


def our_step(model: DecoderSlice, tokens: torch.Tensor, context: int, rows: int) -> tuple[Run, Run]:
    """A step of `rows` rows after `context` tokens (a chain), and what undoes it: nothing, slots are overwritten."""
    slots = np.arange(context + rows, dtype=np.int32)
    model.forward(Step.of_text(tokens[:context], slots[:context]))
    work = Step.of_text(tokens[context : context + rows], slots, context)

    def step() -> None:
        model.logits(model.forward(work))

    return step, lambda: None


def their_step(model: PreTrainedModel, tokens: torch.Tensor, context: int, rows: int) -> tuple[Run, Run]:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(tokens[None, :context], past_key_values=cache)
    ids = tokens[None, context : context + rows]

    def step() -> None:
        with torch.inference_mode():
            model(ids, past_key_values=cache)

    return step, lambda: cache.crop(-rows)


def reference_model(files: ModelFiles, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own model (llama, qwen2) with the weights that we read."""
    config = files.config
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[config.family]
    shape = kind(hidden_size=config.hidden, intermediate_size=config.intermediate, vocab_size=config.vocab_size,
                 num_hidden_layers=config.num_layers, num_attention_heads=config.heads,
                 num_key_value_heads=config.kv_heads, rms_norm_eps=config.rms_eps,
                 max_position_embeddings=config.max_positions, tie_word_embeddings=config.tied,
                 rope_parameters={"rope_type": "default",
                                  "rope_theta": config.rope.inv_freq[1] ** (-config.head_dim / 2)})
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            files.read_into(name, parameter)
    return model.eval()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a decode step, ours and transformers'.")
    parser.add_argument("--model", type=Path, help="GGUF file or folder (llama or qwen2); SmolLM2-135M if absent")
    parser.add_argument("--context", type=int, default=128, help="tokens before the step")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="keep the receipt in lab/receipts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
