"""Fullpipe beside what a user would pick otherwise: same prompts, same machine, one run, on the wall clock. No torch.

    models = PeerModels("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")
    results = run_peers(bundled(), SamplingParams(max_tokens=64), models, ["fullpipe-pp", "transformers", "llamacpp"])
    rows = peer_table(results)
"""

from __future__ import annotations

from fullpipe_lab.peers.known import PEERS, Peer
from fullpipe_lab.peers.modes import better_mode
from fullpipe_lab.peers.records import PeerResult, PeerSample
from fullpipe_lab.peers.run import PeerModels, run_peers
from fullpipe_lab.peers.table import peer_table

__all__ = ["PEERS", "Peer", "PeerModels", "PeerResult", "PeerSample", "better_mode", "peer_table", "run_peers"]
