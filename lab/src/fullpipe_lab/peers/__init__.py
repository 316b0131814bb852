"""Fullpipe beside what a user would pick otherwise: same prompts, same machine, one run, on the wall clock. No torch.

    models = PeerModels("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")
    results = run_peers(bundled(), SamplingParams(max_tokens=64), models, ["fullpipe-pp", "transformers", "llamacpp"])
    print(markdown(peer_table(results)))
"""

from __future__ import annotations

from fullpipe.bench.peers.known import PEERS, Peer
from fullpipe.bench.peers.records import PeerResult, PeerSample
from fullpipe.bench.peers.run import PeerModels, run_peers
from fullpipe.bench.peers.table import markdown, peer_table

__all__ = ["PEERS", "Peer", "PeerModels", "PeerResult", "PeerSample", "markdown", "peer_table", "run_peers"]
