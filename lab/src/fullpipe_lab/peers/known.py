"""The peers, and Fullpipe's own settings that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

_RUNNERS = Path(__file__).parent / "runners"
CONVERTER = _RUNNERS / "convert_gguf.py"
STEPS_RUNNER = _RUNNERS / "llamacpp_steps.py"
SERVER_RUNNER = _RUNNERS / "server_on_host.py"
HEAD_RUNNER = _RUNNERS / "hosts_head.py"


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to run a model.

    environment: name of the virtual environment it lives in; None: the interpreter that runs this.
    runner: the script that speaks `runners/peer_protocol.py`. setup: what it is told beside model, draft and threads.
    processes: how many share the threads. weights: "gguf", "folder" (as transformers writes it), or "any".
    preload: a library of the environment that its makers say should be loaded before all others.
    note: what a reader must know for a fair comparison.
    """

    name: str
    title: str
    environment: str | None
    runner: Path
    weights: Literal["gguf", "folder", "any"]
    setup: Mapping[str, Any] = field(default_factory=dict)
    needs_draft: bool = False
    processes: int = 1
    preload: str = ""
    note: str = ""


_TRANSFORMERS = {"processes": 1, "assisted": False}
_QUANTISED = "computes in the file's quantised weights: reads a quarter of the bytes; PyPI's wheel has no AVX-512"
_NATIVE = "computes in the file's quantised weights; compiled for this processor"
_APART = "each process has its share of the cores, as if it had a machine to itself"

REFERENCE = "fullpipe-pp"
"""Whose text the others are compared with."""


def _fullpipe(name: str, title: str, method: str, stages: int | None = None, processes: int = 1,
              note: str = "") -> Peer:
    """stages: of their own processes; None: in one process, together with the draft."""
    return Peer(name, title, None, _RUNNERS / "fullpipe_peer.py", "any", {"stages": stages, "method": method},
                processes=processes, note=note)


def _llamacpp(environment: str, title: str, note: str) -> list[Peer]:
    """One build of it, in all its modes: plain, with a draft model, and guessing from the text so far."""
    return [Peer(f"{environment}{ending}", f"{title}{mode}", environment, _RUNNERS / "llamacpp_peer.py", "gguf",
                 {"speculative": kind}, needs_draft=kind == "draft", note=note)
            for ending, mode, kind in (("", "", None), ("-draft", ", draft model", "draft"),
                                       ("-ngram", ", ngram-simple", "ngram"))]


PEERS = {peer.name: peer for peer in (
    _fullpipe(REFERENCE, "Fullpipe, pp, 1 stage", "pp"),
    _fullpipe("fullpipe", "Fullpipe, 1 stage, with the draft", "fullpipe",
              note="one process: draft and target take turns on the same cores"),
    _fullpipe("fullpipe-1", "Fullpipe, a stage process and the draft's", "fullpipe", 1, 2,
              "two processes, each with half of the cores"),
    _fullpipe("fullpipe-2-pp", "Fullpipe, pp, 2 stage processes", "pp", 2, 2, _APART),
    _fullpipe("fullpipe-2", "Fullpipe, 2 stage processes and the draft's", "fullpipe", 2, 2,
              "three processes, each with half of the cores: they get in each other's way"),
    Peer("transformers", "transformers generate", "transformers", _RUNNERS / "transformers_peer.py", "folder",
         _TRANSFORMERS),
    Peer("transformers-assisted", "transformers generate, assistant model", "transformers",
         _RUNNERS / "transformers_peer.py", "folder", _TRANSFORMERS | {"assisted": True}, needs_draft=True),
    Peer("transformers-2-pp", "transformers generate, pp_size=2", "transformers",
         _RUNNERS / "transformers_peer.py", "folder", _TRANSFORMERS | {"processes": 2}, processes=2,
         note=_APART + "; the last rank's logits are broadcast to the other for every token"),
    *_llamacpp("llamacpp", "llama.cpp (xllamacpp)", _QUANTISED),
    *_llamacpp("llamacpp-native", "llama.cpp (xllamacpp, compiled here)", _NATIVE),
    Peer("vllm", "vLLM, CPU build", "vllm", _RUNNERS / "vllm_peer.py", "folder", preload="lib/libiomp5.so"),
)}
