"""`python -m fullpipe` is the `fullpipe` command."""

from __future__ import annotations

from fullpipe.cli.main import main

if __name__ == "__main__":
    main()
