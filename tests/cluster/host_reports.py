"""Hosts as they might report themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from fullpipe.cluster.report import Device, HostReport, ModelSeen

GIB = 1 << 30
MODEL = "smollm2-135m"
HASH, OTHER_HASH = "ab" * 32, "cd" * 32


def host(name: str = "alpha", **changes: Any) -> HostReport:
    report = HostReport(
        name=name, address="10.0.0.1", addresses={"eth0": ["10.0.0.1"]},
        versions={"fullpipe": "0.1.0", "python": "3.11.7", "torch": "2.9.0+cpu", "ray": "2.60.0", "pyzmq": "27.1.0"},
        code="0123456789ab", processor="AMD EPYC", kernels="avx512", cores=8,
        devices=[Device("cpu", "AMD EPYC", 16 * GIB)], free_memory=16 * GIB, free_disk=100 * GIB,
        cache="/cache", models=[ModelSeen(MODEL, "/cache/models/smollm2-135m.gguf", 98_362_432, HASH)])
    return msgspec.structs.replace(report, **changes)
