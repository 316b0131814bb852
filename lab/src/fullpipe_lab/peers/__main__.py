"""`python -m fullpipe_lab.peers`: make the peers' environments."""

from __future__ import annotations

import sys

from fullpipe_lab.peers.envs import main

if __name__ == "__main__":
    sys.exit(main())
