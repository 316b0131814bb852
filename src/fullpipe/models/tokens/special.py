"""What a tokenizer puts around plain text."""

from __future__ import annotations

from typing import Any

import tokenizers


def put_around(backend: Any, begin: tuple[str, int] | None, end: tuple[str, int] | None) -> None:
    """Have these tokens (text and id) stand before and after whatever is encoded with special tokens."""
    chosen = {name: token for name, token in (("begin", begin), ("end", end)) if token}
    if not chosen:
        return
    # Names of our own: the text of a token may hold what the template's language means something by.
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["begin"] * bool(begin) + ["$A"] + ["end"] * bool(end),
        special_tokens=[{"id": name, "ids": [id], "tokens": [text]} for name, (text, id) in chosen.items()],
    )
