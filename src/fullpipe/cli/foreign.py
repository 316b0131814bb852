"""What other servers' command lines take, and Fullpipe's does not, is refused with what to type here instead."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_STAGES = "a model is cut into stages here; their number is --stages"
_NO_NEED = "it is not needed here; leave it out"
_OTHERS = {
    **dict.fromkeys(("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"), _STAGES),
    "--data-parallel-size": "start several servers, on ports of their own, with a balancer before them",
    "--gpu-memory-utilization": "the cache of each stage has the size --kv-pool-mib",
    "--enable-auto-tool-choice": "the model may always call tools; leave it out",
    "--tool-call-parser": "it is an option of fullpipe serve",
    "--reasoning-parser": "it is an option of fullpipe serve",
    "--speculative-config": "the draft is named by --draft, and how it is used by --method",
    "--speculative-model": "the draft is named by --draft",
    "--lora-modules": "an adapter is given as --lora NAME=FOLDER, one for each server",
    "--enable-lora": "an adapter is given as --lora NAME=FOLDER",
    "--max-num-batched-tokens": "--prefill-share bounds how much prompts slow tokens down",
    "--download-dir": "set the variable FULLPIPE_HOME",
    "--trust-remote-code": "no code of a model is run; leave it out",
    "--disable-log-requests": "say --log-level warning",
    "--uvicorn-log-level": "say --log-level",
    "--response-role": "answers are the assistant's; leave it out",
    "--tokenizer": "a model's tokenizer is in its folder; leave it out",
    "--seed": "it is said with a request",
    **dict.fromkeys(("--enforce-eager", "--swap-space", "--tokenizer-mode", "--load-format",
                     "--distributed-executor-backend"), _NO_NEED),
}


class Command(TyperCommand):
    """Is a verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {flag for param in self.params for flag in (*param.opts, *param.secondary_opts)}
        for name in (arg.partition("=")[0] for arg in args):
            if name == "--":
                break
            if name in _OTHERS and name not in own:
                ctx.fail(f"No such option: {name}: {_OTHERS[name]}")
        ctx.allow_extra_args = True
        if extra := super().parse_args(ctx, args):
            ctx.fail(f"Got unexpected extra argument(s) ({' '.join(extra)}){self._way_out(own, extra)}")
        return extra

    def _way_out(self, own: set[str], extra: list[str]) -> str:
        """What to type in place of arguments that are too many."""
        if any(param.param_type_name == "argument" for param in self.params):
            return ": put a text of several words into quotes" if "--model" in own else ""
        return f": the model is named by -m, as in -m {extra[0]}" if "-m" in own else ""
