"""Options that several verbs of the laboratory share, beside those of `fullpipe.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullpipe.cli.options import Only
from fullpipe.options import ModelOptions
from fullpipe.request import SamplingParams

Model = Annotated[ModelOptions, Only("model", "draft", "dtype")]
Target = Annotated[ModelOptions, Only("model", "dtype")]
Length = Annotated[SamplingParams, Only("max_tokens")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Compute threads.")]
Prompts = Annotated[list[Path] | None, typer.Option("--prompts", metavar="FILE", help="Prompts, JSON lines with turns; "
                                                    "may be repeated. Default: the bundled set.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Prompts per file at most; of the bundled set, per "
                                           "category.")]
Turns = Annotated[int | None, typer.Option("--turns", min=1, help="Turns per prompt at most. Default: all.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds.")]
Peers = Annotated[list[str] | None, typer.Option("--peer", metavar="NAME", help="Ask this one; may be repeated. "
                                                 "Default: all; those that are not installed are told.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="What is written goes here.")]

SEED_7 = SamplingParams(seed=7)
"""What is measured is sampled with this seed unless somebody says otherwise."""
