"""A process that looks at structures, and may die of one: `python -m fullpipe.models.tokens.checker`.

Some structures take minutes to prepare, or more memory than there is, or a deeper stack; llguidance does not always say
so. What this process, with little of each, has done with a structure, a station can do.

A line of JSON comes in for each: what tokens there are, and the structure. One goes out: what is wrong, or null.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from functools import lru_cache
from typing import Any

import msgspec

from fullpipe.models.tokens.checking import LIMIT_S, Question, Tokens
from fullpipe.models.tokens.matching import grammar, library, matcher
from fullpipe.request import Structured

_MEMORY = 1 << 30  # bytes beyond what is there at the beginning; of address space, of which allocators take much
_STACK = 1 << 20  # an eighth of a station's


def fault_of(asked: Question) -> str | None:
    try:
        found = matcher(_tokenizer(asked.tokens), grammar(Structured(asked.kind, asked.text)))
    except ValueError as error:
        return str(error)
    if not found.is_error():
        found.compute_bitmask()
    return found.get_error() if found.is_error() else None


@lru_cache(maxsize=2)
def _tokenizer(tokens: Tokens) -> Any:
    return library().LLTokenizer(_Bytes(tokens))


class _Bytes:
    """Has tokens for bytes and those with names. The others are nothing: what can be followed does not depend on
    them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, known: Tokens) -> None:
        named = dict(known.special)
        self._first = known.size
        self.tokens = [b""] * known.size + [bytes([byte]) for byte in range(256)]
        for name, token in named.items():
            self.tokens[token] = name.encode()
        self.eos_token_id = min(known.ends)
        self.special_token_ids = sorted({*named.values(), *known.ends})

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._first + byte for byte in (text if isinstance(text, bytes) else text.encode())]


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _confine() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        limit = _address_space() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(_STACK)


def _answered(line: bytes) -> bytes:
    """What is wrong, found out in a thread, for a thread has the stack that it is given."""
    said: list[str | None] = ["it could not be looked at"]

    asked = msgspec.json.decode(line, type=Question)
    _tokenizer(asked.tokens)

    def look() -> None:
        said[0] = fault_of(asked)

    thread = threading.Thread(target=look)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # the system ends the process when it is over
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return msgspec.json.encode(said[0]) + b"\n"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    library()
    _confine()
    sys.stdout.buffer.write(b"null\n")  # ready
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_answered(line))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
