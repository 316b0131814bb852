"""From options to a trained module: read the text, open the target, train, draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fullpipe.errors import UsageError
from fullpipe.models.spd_checkpoint import hash_of, identity_of
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from fullpipe.training.data import Report, fingerprint, read_samples, split
from fullpipe.training.plan import Plan
from fullpipe.training.trainer import Material, Trainer
from fullpipe.training.trainer import Report as Progress
from fullpipe.training.vocab import build_vocab, load_vocab


def gather(plan: Plan, model: Path, name: str, data: Sequence[Path], *, vocab: Path | None, vocab_size: int,
           say: Callable[[str], None]) -> Material:
    """Read everything that a run learns from. vocab: a file of `fullpipe train vocab`; None: the `vocab_size` tokens
    that are said most in the text.

    Raises `UsageError` for text that cannot be used, and what opening the model raises.
    """
    files, tokenizer, report = open_model(model), load_tokenizer(model), Report()
    if plan.max_length > files.config.max_positions:
        raise UsageError(f"texts of {plan.max_length} tokens are longer than the model's {files.config.max_positions}",
                         hint="Give a smaller `max_length`.")
    samples = read_samples(data, tokenizer, max_length=plan.max_length, report=report)
    say(report.summary())
    train, held_out = split(samples, plan.validation, plan.seed)
    known = min(vocab_size, len(tokenizer.tokens))
    words = load_vocab(vocab, tokenizer=tokenizer) if vocab else build_vocab(train, known, tokenizer=tokenizer)
    mass = f", {words.mass:.1%} of the labels" if words.total else ""
    say(f"{len(train)} texts to learn from, {len(held_out)} held out; draft vocabulary of {len(words)} tokens{mass}")
    dtype = "bfloat16" if plan.precision == "bf16" else "float32"
    identity = identity_of(model, name=name, dtype=dtype, tokenizer=tokenizer)
    key = hash_of({"model": identity.config_hash, "quantisation": identity.quantisation, "dtype": dtype,
                   "text": fingerprint(data, tokenizer, max_length=plan.max_length), "validation": plan.validation,
                   "seed": plan.seed})
    return Material(files, train, held_out, torch.from_numpy(words.ids.copy()), tokenizer.eos_ids, identity, key)


def train(plan: Plan, material: Material, out: Path, progress: Progress, *, save_every_s: float = 120.0,
          features: Path | None = None, feature_taps: Sequence[int] = ()) -> dict[str, Any]:
    """Train, or go on training, and leave the checkpoint in `out`, with curve.png where matplotlib is installed.

    features: where hidden states are kept; None: in `out`. feature_taps: further layers to keep there.
    Returns the training summary.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(plan, material, out, save_every_s=save_every_s, features=features, feature_taps=feature_taps)
        summary = trainer.run(progress)
        if trainer.leads:
            (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            draw_curve(trainer.curve, out / "curve.png")
    except OSError as error:
        raise UsageError(f"cannot write in {out}: {error.strerror or error}",
                         hint="Name a folder that is writable and has room; what was saved is as it was.") from error
    return summary


def draw_curve(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Loss and accuracy over steps, as one picture; nothing without matplotlib or without figures."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not curve:
        return
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, steps = figure.add_subplot(), [point["step"] for point in curve]
    right = left.twinx()
    left.plot(steps, [point["loss"] for point in curve], color="tab:blue")
    right.plot(steps, [100 * point["accuracy"] for point in curve], color="tab:orange")
    left.set(xlabel="step", ylabel="loss (nats)")
    left.yaxis.label.set_color("tab:blue")
    right.set(ylabel="training labels right (%)", ylim=(0, 100))
    right.yaxis.label.set_color("tab:orange")
    left.set_title("Each point is the mean of 50 steps", fontsize=9)
    figure.savefig(path, dpi=120)
