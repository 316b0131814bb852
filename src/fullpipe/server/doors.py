"""What a server's doors are made of is looked at here before anything is loaded: files with keys, and certificates."""

from __future__ import annotations

import ssl
from pathlib import Path

from fullpipe.errors import UsageError
from fullpipe.options import ServerOptions


def keys_in(file: str) -> tuple[str, ...]:
    """The API keys of a file, one a line. Raises UsageError where it cannot be read, or has none: who names one does
    not mean to let everybody in."""
    keys = tuple(line.strip() for line in _text(file, "api_key_file").splitlines() if line.strip())
    if not keys:
        raise UsageError(f"there is no API key in {file}", param="api_key_file",
                         hint="Write one key a line, or leave `api_key_file` out to let everybody in.")
    return keys


def check_certificate(options: ServerOptions) -> None:
    """Raises UsageError where the server could not speak TLS with what it was given for that."""
    if options.ssl_certfile is None:
        return
    for name, file in (("ssl_certfile", options.ssl_certfile), ("ssl_keyfile", options.ssl_keyfile)):
        if file is not None:
            _text(file, name)
    password = options.ssl_keyfile_password or ""  # without any, OpenSSL would ask at the terminal
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.ssl_certfile, options.ssl_keyfile,
                                                                lambda: password)
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(f"the certificate {options.ssl_certfile} cannot be used with its key: {_told(error)}",
                         hint="Give the certificate as PEM in `ssl_certfile`, the key that it was made for in "
                              "`ssl_keyfile`, and its password, if it has one, in `ssl_keyfile_password`.",
                         param="ssl_certfile") from error


def _text(file: str, option: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{file} cannot be read ({told})", hint=f"Name a file that is there: `{option}`.",
                         param=option) from error


def _told(error: ssl.SSLError | ValueError) -> str:
    """OpenSSL's own reason, in words; where it has none, its message."""
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
