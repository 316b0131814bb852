"""Chat templates tell of tools what transformers has them tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fullpipe.errors import MessageError
from fullpipe.hub import cache
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.server.tools.names import STYLES, style_of
from tool_templates import CLOCK, LLAMA_TOOLS, MISTRAL_TOOLS, QWEN_TOOLS, WEATHER, tool

USER = {"role": "user", "content": "Wie spät ist es?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SIZE = tool("größe", {"type": "object", "properties": {"was": {"enum": ["<a>", "ü"], "default": None}}})
TOOLS = [WEATHER, CLOCK, SIZE]
CODER = cache.home() / "models" / "qwen2.5-coder-0.5b.gguf"  # of the catalogue, if it has been fetched


def theirs(source: str, messages: list[Any], tools: list[Any] | None) -> str:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **TOKENS)
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("tools", [TOOLS, [CLOCK], None, []])
@pytest.mark.parametrize("source", [QWEN_TOOLS, LLAMA_TOOLS, MISTRAL_TOOLS])
def test_as_transformers_renders_them(source: str, tools: list[Any] | None) -> None:
    for messages in ([USER], [SYSTEM, USER]) if source == QWEN_TOOLS else ([USER],):
        assert ChatTemplate(source, TOKENS).render(messages, tools=tools) == theirs(source, messages, tools or None)


def test_a_template_without_words_for_tools_refuses_them() -> None:
    with pytest.raises(MessageError, match="no words for them") as caught:
        ChatTemplate("{{ messages[0].content }}").render([USER], tools=TOOLS)
    assert caught.value.where == "tools"
    assert ChatTemplate("{{ messages[0].content }}").render([USER], tools=[]) == USER["content"]


@pytest.mark.skipif(not CODER.exists(), reason="the model has not been fetched")
def test_qwens_own_template() -> None:
    tokenizer = load_tokenizer(Path(CODER))
    assert tokenizer.template is not None
    source = tokenizer.template.source
    assert tokenizer.template.render([USER], tools=TOOLS) == theirs(source, [USER], TOOLS)
    assert style_of("auto", source) is STYLES["hermes"]
