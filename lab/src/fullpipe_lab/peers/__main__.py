"""`python -m fullpipe.bench.peers`: make the peers' environments."""

from __future__ import annotations

import sys

from fullpipe.bench.peers.envs import main

if __name__ == "__main__":
    sys.exit(main())
