"""Options that several verbs share, written once."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from fullpipe.errors import PromptError, UsageError
from fullpipe.hub import DEFAULT_TARGET


class Method(StrEnum):
    pp = "pp"
    chain = "chain"
    static_tree = "static-tree"
    pipedec = "pipedec"
    spd = "spd"
    ppsd = "ppsd"
    fullpipe = "fullpipe"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class PipelineKind(StrEnum):
    inprocess = "inprocess"
    distributed = "distributed"


class Clock(StrEnum):
    virtual = "virtual"
    wall = "wall"


class Costs(StrEnum):
    measured = "measured"
    unit = "unit"


Model = Annotated[str, typer.Option("--model", "-m", help="Catalogue name, safetensors directory, GGUF file, or "
                                    "Hugging Face id.")]
Draft = Annotated[str, typer.Option("--draft", "-d", help="Who guesses: auto (ngram, and the model's partner), none, "
                                    "ngram, a model, a draft module (spd:DIR, exit:DIR), or several with commas "
                                    "between.")]
Stages = Annotated[int, typer.Option("--stages", help="Pipeline stages to cut the model into.")]
MethodOption = Annotated[Method, typer.Option("--method", help="Which nodes enter the pipeline, and when.")]
Width = Annotated[int | None, typer.Option("--width", help="Tree nodes per flight at most: 8, or 1 with spd and ppsd, "
                                           "if not given; pp and chain have none.", show_default=False)]
Depth = Annotated[int | None, typer.Option("--depth", help="Tokens guessed per traversal; for chain and "
                                     "static-tree alone.")]
Refresh = Annotated[bool | None, typer.Option("--refresh/--no-refresh", help="Ask the draft again about tokens in "
                                              "flight. Default: with spd:DIR, which answers better each time (methods "
                                              "spd and fullpipe).", show_default=False)]
Accept = Annotated[str, typer.Option("--accept", metavar="exact|typical:EPS", help="exact: the model's own text. "
                                     "typical:EPS: LOSSY, a guessed token may stand where the model would have said "
                                     "another (0 < EPS <= 1; the smaller, the more).")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="End after so many new tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this total probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 avoids repeating; 1: none.")]
Seed = Annotated[int, typer.Option("--seed", help="The text is a function of model, prompt, parameters and seed.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the text at this string; may be repeated.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="auto: bfloat16 where the processor computes in it.")]
PipelineOption = Annotated[PipelineKind, typer.Option("--pipeline", help="inprocess: all stages here. distributed: a "
                                                      "process per stage.")]
ClockOption = Annotated[Clock, typer.Option("--clock", help="Time of in-process runs: virtual (as if each stage had a "
                                            "machine like this one) or wall.")]
CostsOption = Annotated[Costs, typer.Option("--costs", help="Virtual time of a stage step and a draft call: measured, "
                                            "or one unit (1 s) each.")]
LinkMs = Annotated[float, typer.Option("--link-ms", help="Latency of every hop: in virtual time, or emulated between "
                                    "the processes of a distributed pipeline.")]
LinkMbit = Annotated[float | None, typer.Option("--link-mbit", help="Bandwidth of every hop in Mbit/s; unlimited if "
                                                "not given.")]
ClusterOption = Annotated[str | None, typer.Option("--cluster", metavar="FILE", help="As if on the cluster that a "
                                                   "TOML file, or a preset, describes: on its virtual time, or paced "
                                                   "and with its links emulated (distributed).")]
Threads = Annotated[int | None, typer.Option("--threads", help="Compute threads (distributed: of each stage, 1).")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Time without progress after which a "
                                        "process of a distributed pipeline counts as hung.")]
StartTimeout = Annotated[float, typer.Option("--start-timeout", metavar="SECONDS", help="Time that the processes of a "
                                             "distributed pipeline may take to start.")]
System = Annotated[str | None, typer.Option("--system", help="System message.")]
NoChatTemplate = Annotated[bool, typer.Option("--no-chat-template", help="Continue the prompt as plain text.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")]

DEFAULT_MODEL = DEFAULT_TARGET


def parse_accept(text: str) -> float:
    """`SamplingParams.accept_typical` of an `--accept`: 0 for "exact". Raises UsageError for anything else."""
    if text == "exact":
        return 0.0
    kind, _, number = text.partition(":")
    try:
        epsilon = float(number) if kind == "typical" else 0.0
    except ValueError:
        epsilon = 0.0
    if not 0 < epsilon <= 1:
        raise UsageError(f"--accept takes exact, or typical:EPS with EPS above 0 and at most 1 (got {text!r})",
                         hint="exact is the model's own text; typical:0.3 lets likely guesses stand in its place.")
    return epsilon


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for "-". Raises PromptError when there is nothing in it."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise PromptError("the prompt is empty", hint='Write fullpipe generate "PROMPT", or - to read standard input.')
    return text


def as_prompt(text: str, system: str | None, no_chat_template: bool) -> str | list[dict[str, str]]:
    """Plain text, or messages for the model's chat template."""
    if no_chat_template:
        return text
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]
