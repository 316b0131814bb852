"""The chain model, which other tests lean on."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from chain import write_chain
from fullpipe import LLM


def test_it_says_its_chain_whatever_the_prompt(tmp_path: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "a", "b", "c", "d", "e"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = write_chain(tmp_path, backend, [3, 1, 4, 2], config={"eos_token_id": 2})
    with LLM(folder, draft="none") as llm:
        for prompt, expected in (("e c", [1, 4, 2]), ("b d", [2])):
            answer = llm.generate(prompt)[0]
            assert (answer.token_ids, answer.finish_reason) == (expected, "stop")
