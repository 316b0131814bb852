"""Options that several verbs of the laboratory share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullpipe.options import DEFAULT_MODEL

Model = Annotated[str, typer.Option("--model", "-m", help="Catalogue name, safetensors directory, GGUF file, or "
                                    "Hugging Face id.")]
Draft = Annotated[str, typer.Option("--draft", "-d", help="Who guesses, as for fullpipe generate.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="End after so many new tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
Seed = Annotated[int, typer.Option("--seed", help="The text is a function of model, prompt, parameters and seed.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, or auto: bfloat16 where the processor "
                                          "computes in it.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads.")]
Prompts = Annotated[list[Path] | None, typer.Option("--prompts", metavar="FILE", help="Prompts, JSON lines with turns; "
                                                    "may be repeated. Default: the bundled set.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Prompts per file at most; of the bundled set, per "
                                           "category.")]
Turns = Annotated[int | None, typer.Option("--turns", min=1, help="Turns per prompt at most. Default: all.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="What is written goes here.")]

__all__ = ["DEFAULT_MODEL", "Draft", "DtypeOption", "Limit", "MaxTokens", "Model", "Out", "Prompts", "Repeats", "Seed",
           "Temperature", "Threads", "Turns"]
