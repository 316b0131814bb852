"""vLLM's CPU build: its engine, stepped in this process, one request at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

from peer_protocol import Answer, Setup, serve  # type: ignore[import-not-found]


def load(setup: Setup) -> tuple[str, Setup, Answer]:
    # Read when vLLM is imported. It would leave a core idle for its web server, which there is none of here.
    cores = sorted(os.sched_getaffinity(0))[: setup["threads"]]
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
                      VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")
    import vllm  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    llm = vllm.LLM(model=setup["model"], dtype=setup["dtype"], skip_tokenizer_init=True,
                   max_model_len=setup["max_len"], max_num_seqs=1, enable_prefix_caching=False)
    engine, ids = llm.llm_engine, count()

    def answer(prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        params = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, stop_token_ids=setup["eos"],
                                     detokenize=False, output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(next(ids)), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                yield list(output.outputs[0].token_ids)

    return vllm.__version__, {"dtype": setup["dtype"], "threads": setup["threads"], "prefix_caching": False}, answer


if __name__ == "__main__":
    serve(load)
