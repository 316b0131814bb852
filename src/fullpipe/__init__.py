"""Fullpipe: decode one request fast on a model cut into pipeline stages, and say exactly what it would."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fullpipe.request import SamplingParams, Structured
from fullpipe.threads import share_the_machine

if TYPE_CHECKING:
    from fullpipe.llm import LLM, Chunk, Completion

__version__ = "0.1.0"
__all__ = ["LLM", "Chunk", "Completion", "SamplingParams", "Structured", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` and what it returns are loaded when first used, so that the torch-free parts stay so."""
    if name in ("LLM", "Chunk", "Completion"):
        share_the_machine()
        return getattr(import_module("fullpipe.llm"), name)
    raise AttributeError(f"module 'fullpipe' has no attribute {name!r}")
