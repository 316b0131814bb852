"""A pipeline on several hosts is exchanged for a better one when hosts have come, or some have become slower."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from fullpipe.assembly import Assembly
from fullpipe.errors import FullpipeError
from fullpipe.service import Service

if TYPE_CHECKING:
    from fullpipe.assembly.hosts import OnHosts

log = logging.getLogger(__name__)

_EVERY_S = 3.0
_QUIET_S = 40.0  # a quiet moment is waited for so long, so that a host that comes is taken in within a minute
SLOWER = 1.25
"""A station that takes this much longer than planned makes another plan worth a look,"""
_FOR_S = 30.0  # if it does so for so long
_GAIN = 0.95  # and another plan is worth an exchange if it promises a token in this share of the time


class Adapting:
    """Watches the hosts of a service, from now to `close`, in a thread of its own."""

    def __init__(self, service: Service[Any], hosts: OnHosts) -> None:
        self._service, self._hosts = service, hosts
        self._slow_since: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fullpipe-adapting", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(timeout=_EVERY_S)

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            if self._service.status().state != "ready":
                self._slow_since.clear()
                continue
            try:
                self._note_slow(time.monotonic())
                if why := self._hosts.better(_GAIN):
                    self._service.recut(why, _QUIET_S)
            except FullpipeError as error:
                log.warning("the hosts could not be looked at: %s", error)
            except Exception:
                log.exception("watching the hosts has failed; it goes on")

    def _note_slow(self, now: float) -> None:
        """Have plans made with what hosts really take, where that has been off for a while."""
        off = {host: factor for host, factor in self._hosts.slower().items()
               if factor > SLOWER or factor < 1 / SLOWER}
        self._slow_since = {host: self._slow_since.get(host, now) for host in off}
        for host, since in list(self._slow_since.items()):
            if now - since >= _FOR_S:
                log.info("%s takes %.2f times as long as planned", host, off[host])
                self._hosts.take_for(host, off[host])
                del self._slow_since[host]


def adapting(service: Service[Any], made: Assembly) -> Adapting | None:
    """Who watches the hosts of what was made, if there are several and the options ask for it."""
    if made.hosts is None or not made.prepared.options.pipeline.adaptive:
        return None
    return Adapting(service, made.hosts)
