"""`python -m fullpipe`, and the `fullpipe` command."""

from __future__ import annotations

import signal


def main() -> None:
    """Entry point. What the command line needs is imported here, while Ctrl-C kills: an exception would come up in the
    middle of an import and be shown with all that it went through."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fullpipe.cli import main as command

    command.main()


if __name__ == "__main__":
    main()
