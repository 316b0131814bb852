"""`fullpipe train spd` and `fullpipe train exit`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fullpipe import hub
from fullpipe.cli import console, options
from fullpipe.cli.lists import integers
from fullpipe.errors import UsageError

if TYPE_CHECKING:
    from fullpipe.training.plan import Plan

Data = Annotated[list[Path], typer.Option("--data", metavar="FILE", help="Training text: plain text, JSON lines of "
                                          "messages or conversations, or a folder of such; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the module goes. If a run was begun "
                                   "there, the same command goes on with it.")]
StageCounts = Annotated[str, typer.Option("--stages", metavar="N[,N...]", help="Stages of the pipelines that it will "
                                          "draft for.")]
Layers = Annotated[int, typer.Option("--layers", min=1, help="Decoder layers of the module.")]
Taps = Annotated[str | None, typer.Option("--taps", metavar="B,B,...", help="Layers finished where hidden states are "
                                          "read, 0 being the embedding. Default: chosen for the stages.")]
InitLayers = Annotated[str | None, typer.Option("--init-layers", metavar="I,...", help="Layers of the target that the "
                                                "module's start as. Default: from its middle.")]
OwnHead = Annotated[bool, typer.Option("--own-head/--shared-head", help="Train a head, or use the target's, frozen.")]
VocabFile = Annotated[Path | None, typer.Option("--vocab", metavar="FILE", help="A draft vocabulary of `train vocab`.")]
VocabSize = Annotated[int, typer.Option("--vocab-size", min=1, help="Without --vocab: the tokens said most.")]
Loss = Annotated[str, typer.Option("--loss", help="forward-kl, reverse-kl or total-variation.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the text. Default: 1, without --steps and "
                                              "--minutes.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps at most.")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Minutes at most, earlier ones of the same run "
                                               "counted.")]
Lr = Annotated[float, typer.Option("--lr", help="Highest learning rate.")]
Warmup = Annotated[int, typer.Option("--warmup", min=0, help="Steps until it is reached.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", min=0.0)]
Clip = Annotated[float, typer.Option("--clip", help="Greatest norm of a gradient.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens of a text; longer ones are cut into several.")]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", min=1, help="Tokens of a batch, on each device.")]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, help="Batches per step.")]
Validation = Annotated[float, typer.Option("--validation", help="Share of the texts that is held out.")]
FillPower = Annotated[float, typer.Option("--fill-power", help="The loss with f tokens in flight counts (f / stages) "
                                          "** POWER: above 0 a full pipeline counts more.")]
Refreshed = Annotated[float, typer.Option("--refreshed", help="Share of batches in which the newest token is already "
                                          "in flight.")]
Ahead = Annotated[float, typer.Option("--ahead", help="Share in which drafts run ahead of the launches.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Compute layers again in the backward "
                                             "pass: less memory, more time.")]
Recompute = Annotated[bool, typer.Option("--recompute-logits", help="The same for logits over the draft vocabulary.")]
Precision = Annotated[str, typer.Option("--precision", help="bf16 (weights stay fp32), or fp32.")]
SaveMinutes = Annotated[float, typer.Option("--save-minutes", help="Minutes between saves.")]
Features = Annotated[Path | None, typer.Option("--features", metavar="DIR", help="Where the target's hidden states are "
                                               "kept, 2 bytes a number; runs on the same text can share them. Default: "
                                               "in --out.")]
FeatureTaps = Annotated[str | None, typer.Option("--feature-taps", metavar="B,...", help="Further layers to keep "
                                                 "there, for other runs.")]
OneStageCount = Annotated[int, typer.Option("--stages", min=1, help="Stages; the exit is after the first.")]
ExitTap = Annotated[int | None, typer.Option("--tap", min=1, help="Layers before the exit. Default: the first stage.")]


def spd(
    data: Data,
    out: Out,
    model: options.Model = options.DEFAULT_MODEL,
    stages: StageCounts = "8",
    layers: Layers = 1,
    taps: Taps = None,
    init_layers: InitLayers = None,
    own_head: OwnHead = False,
    vocab: VocabFile = None,
    vocab_size: VocabSize = 8192,
    loss: Loss = "forward-kl",
    epochs: Epochs = None,
    steps: Steps = None,
    minutes: Minutes = None,
    lr: Lr = 1e-3,
    warmup: Warmup = 50,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    max_length: MaxLength = 512,
    batch_tokens: BatchTokens = 1024,
    accumulate: Accumulate = 1,
    validation: Validation = 0.05,
    fill_power: FillPower = 0.0,
    refreshed: Refreshed = 0.15,
    ahead: Ahead = 0.15,
    seed: options.Seed = 0,
    gradient_checkpointing: Checkpointing = False,
    recompute_logits: Recompute = False,
    precision: Precision = "bf16",
    threads: options.Threads = None,
    save_minutes: SaveMinutes = 2.0,
    features: Features = None,
    feature_taps: FeatureTaps = None,
) -> None:
    """Train a pipeline draft module: it reads hidden states of every stage while they compute."""
    _train("spd", locals())



def exit_head(
    data: Data,
    out: Out,
    model: options.Model = options.DEFAULT_MODEL,
    stages: OneStageCount = 8,
    layers: Layers = 1,
    tap: ExitTap = None,
    init_layers: InitLayers = None,
    own_head: OwnHead = False,
    vocab: VocabFile = None,
    vocab_size: VocabSize = 8192,
    loss: Loss = "forward-kl",
    epochs: Epochs = None,
    steps: Steps = None,
    minutes: Minutes = None,
    lr: Lr = 1e-3,
    warmup: Warmup = 50,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    max_length: MaxLength = 512,
    batch_tokens: BatchTokens = 1024,
    accumulate: Accumulate = 1,
    validation: Validation = 0.05,
    seed: options.Seed = 0,
    gradient_checkpointing: Checkpointing = False,
    recompute_logits: Recompute = False,
    precision: Precision = "bf16",
    threads: options.Threads = None,
    save_minutes: SaveMinutes = 2.0,
    features: Features = None,
    feature_taps: FeatureTaps = None,
) -> None:
    """Train an early-exit head (PPSD): it guesses from what the first stage knows."""
    _train("exit", locals())


# What the plan calls otherwise than the command line does.
_NAMES = {"taps": "bounds", "tap": "bounds", "lr": "rate", "fill_power": "power",
          "gradient_checkpointing": "checkpointing"}
_LISTS = {"stages": ("--stages", 1), "bounds": ("--taps", 0), "init_layers": ("--init-layers", 0)}  # least entries
_RUN = ("data", "out", "model", "vocab", "vocab_size", "threads", "save_minutes", "features", "feature_taps")


def _plan(kind: Literal["spd", "exit"], given: dict[str, Any]) -> Plan:
    """From what the command line says; an exit head has one tap and no fillings to vary."""
    from fullpipe.training.plan import Plan

    asked = {_NAMES.get(name, name): value for name, value in given.items() if name not in _RUN}
    asked["shared_head"] = not asked.pop("own_head")
    for name, (option, least) in _LISTS.items():
        if isinstance(value := asked[name], str):
            asked[name] = tuple(integers(value, option, least=least))
        elif value is not None:
            asked[name] = (value,)
    if kind == "exit":
        asked |= {"refreshed": 0.0, "ahead": 0.0}
    if all(asked[name] is None for name in ("epochs", "steps", "minutes")):
        asked["epochs"] = 1.0
    return Plan(kind=kind, **asked)


def _train(kind: Literal["spd", "exit"], given: dict[str, Any]) -> None:
    """given: all that a verb was given, by name."""
    plan = _plan(kind, given)
    data, out, model, vocab, vocab_size, threads, save_minutes, features, feature_taps = (
        given[name] for name in _RUN)
    if save_minutes <= 0:
        raise UsageError(f"the minutes between saves must be above 0 (got {save_minutes:g})")
    import torch

    from fullpipe.training.run import gather, train

    if threads is not None:
        torch.set_num_threads(threads)
    with console.TransferBar() as bar:
        path = hub.resolve(model, progress=bar)
    talks = int(os.environ.get("RANK", "0")) == 0  # under torchrun or accelerate, one process does
    say = console.print_note if talks else (lambda line: None)
    material = gather(plan, path, model, data, vocab=vocab, vocab_size=vocab_size, say=say)
    with console.ShareBar("training") as progress:
        summary = train(plan, material, out, progress if talks else (lambda *_: None),
                        save_every_s=60 * save_minutes, features=features,
                        feature_taps=integers(feature_taps, "--feature-taps") if feature_taps else ())
    if talks:
        console.print_table(("stages", "in flight", "depth", "right first", "among 4"), [
            [str(row["stages"]), str(row["fill"]), str(row["depth"]), f"{row['top1']:.1%}", f"{row['top4']:.1%}"]
            for row in summary["acceptance"]])
        typer.echo(f"{out}: {summary['steps']} steps in {summary['seconds']:.0f} s; "
                   f"use it with --draft {kind}:{out}")
