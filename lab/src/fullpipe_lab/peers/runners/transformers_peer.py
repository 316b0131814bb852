"""transformers `generate`: plain, with an assistant model, or with its own pipeline parallelism over processes.

Pipeline parallelism is `DistributedConfig(pp_size=n)` (seen in transformers 5.23): layers are cut evenly, every rank
runs `generate`, and the last rank's logits are broadcast to all. This process is rank 0 and starts the other ranks,
which are asked the same questions.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from peer_protocol import Answer, Setup, serve  # type: ignore[import-not-found]


def load(setup: Setup) -> tuple[str, Setup, Answer]:
    processes = setup["processes"]
    others = _start_others(setup) if processes > 1 and os.environ.get("RANK", "0") == "0" else []
    import torch
    import transformers

    torch.set_num_threads(setup["threads"])
    options: dict[str, Any] = {"dtype": getattr(torch, setup["dtype"])}
    model = _model(transformers, setup["model"], options, processes)
    assistant = _model(transformers, setup["draft"], options, 1) if setup["assisted"] else None
    answer = _answer(torch, model, assistant, setup["eos"])

    def ask_all(prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        for other in others:
            _tell(other, {"prompt": prompt, "max_tokens": max_tokens})
        yield from answer(prompt, max_tokens)

    settings = {"dtype": setup["dtype"], "threads_per_process": setup["threads"], "processes": processes,
                "torch": torch.__version__, "attention": model.config._attn_implementation,
                "assisted": setup["assisted"]}
    return transformers.__version__, settings, ask_all


def _model(transformers: Any, path: str, options: dict[str, Any], processes: int) -> Any:
    if processes > 1:
        from transformers.distributed import DistributedConfig

        options = options | {"distributed_config": DistributedConfig(pp_size=processes)}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def _answer(torch: Any, model: Any, assistant: Any, eos: list[int]) -> Answer:
    """`generate` in a thread of its own, its streamer filling a queue."""

    def answer(prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        fresh: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            ids = torch.tensor([prompt])
            try:
                model.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, do_sample=False,
                               max_new_tokens=max_tokens, eos_token_id=eos, streamer=_Streamer(fresh))
                fresh.put(None)
            except BaseException as error:
                fresh.put(error)

        worker = threading.Thread(target=work)
        worker.start()
        while (tokens := fresh.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield tokens
        worker.join()

    return answer


class _Streamer:
    """What `generate` calls: first with the prompt, then with new tokens."""

    def __init__(self, fresh: queue.SimpleQueue[Any]) -> None:
        self.fresh, self.told_prompt = fresh, False

    def put(self, value: Any) -> None:
        if self.told_prompt:
            self.fresh.put([int(token) for token in value.reshape(-1)])
        self.told_prompt = True

    def end(self) -> None:
        """Nothing is held back, so nothing is left."""


def _start_others(setup: Setup) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(setup["processes"])}
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    others = []
    for rank in range(1, setup["processes"]):
        process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   text=True, env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        _tell(process, setup)
        others.append(process)
    return others


def _tell(process: subprocess.Popen[str], value: dict[str, Any]) -> None:
    pipe: IO[str] = process.stdin  # type: ignore[assignment]
    pipe.write(json.dumps(value) + "\n")
    pipe.flush()


if __name__ == "__main__":
    serve(load)
