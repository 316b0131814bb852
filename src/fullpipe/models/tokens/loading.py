"""A model's tokenizer, whatever kind of file it lies in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fullpipe.errors import UnsupportedModel, UsageError
from fullpipe.models.tokens.directory import directory_tokenizer
from fullpipe.models.tokens.gguf import gguf_tokenizer
from fullpipe.models.tokens.template import ChatTemplate, template_source
from fullpipe.models.tokens.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file or of a directory as transformers writes it.

    Raises `UnsupportedModel` for a kind of tokenizer that we do not know, `DamagedModel` when its files are missing or
    broken.
    """
    return directory_tokenizer(path) if path.is_dir() else gguf_tokenizer(path)


def with_template(tokenizer: Tokenizer, given: str | None, variables: Mapping[str, Any] | None,
                  say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer with another chat template and what templates are told besides, both as `ModelOptions` has them.

    say: told when the model's own template is broken: chats will be refused then, and plain text is still continued.
    It is told too of variables that the template does not read.
    Raises `UsageError` when the given one is no template, or there is none to be told the variables.
    """
    own = tokenizer.template.source if tokenizer.template is not None else None
    source = own if given is None else template_source(given)
    if source is None:
        if variables:
            raise UsageError(f"default_chat_template_kwargs are for a chat template, and {tokenizer.name} has none",
                             hint="Give it one: `chat_template=FILE`.")
        return tokenizer
    template = ChatTemplate(source, tokenizer.named, variables)
    try:
        template.check()
    except UnsupportedModel as error:
        if given is not None:
            raise UsageError(error.message.replace("the model's", "the given"), hint="Mend it, or drop "
                             "`chat_template` to use the model's own.") from error
        say(f"{error.message}; chats will be refused")
        return replace(tokenizer, template=template)
    if idle := [name for name in variables or {} if not template.reads(name)]:
        say(f"warning: the chat template does not read {', '.join(idle)}, of `default_chat_template_kwargs`, so that "
            "has no effect")
    return replace(tokenizer, template=template)
