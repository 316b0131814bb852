"""The peers' results as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from fullpipe_lab.peers.known import REFERENCE
from fullpipe_lab.peers.records import PeerResult


def peer_table(results: Sequence[PeerResult]) -> list[dict[str, Any]]:
    """One row per peer; plain JSON, None where there is nothing to tell. Wall-clock times.

    tbt_ms: median over all answers of their mean time between tokens, and the lowest and highest of them.
    tokens_per_s: all tokens over all time, from the question to the last token. over_pp: ratio of the time between
    tokens of Fullpipe's `pp` to the peer's, median over the prompts that both answered.
    same_text: as Fullpipe's `pp`: "yes", or how many are, and the first token that differs in any.
    remark: why there are no figures, or what the figures must be read with.
    """
    reference = next((result for result in results if result.name == REFERENCE), None)
    return [_row(result, reference) for result in results]


def _row(result: PeerResult, reference: PeerResult | None) -> dict[str, Any]:
    between = [sample.tbt_s * 1e3 for sample in result.samples if sample.tbt_s is not None]
    first = [sample.ttft_s * 1e3 for sample in result.samples if sample.ttft_s is not None]
    tokens = sum(len(sample.tokens) for sample in result.samples)
    spent = sum(sample.times[-1] for sample in result.samples if sample.times)
    memory = result.peak_rss_bytes
    return {
        "peer": result.title,
        "version": result.version,
        "status": result.status,
        "answers": len(result.samples),
        "tbt_ms": round(median(between), 2) if between else None,
        "tbt_spread_ms": f"{min(between):.1f} to {max(between):.1f}" if between else None,
        "tokens_per_s": round(tokens / spent, 2) if spent else None,
        "ttft_ms": round(median(first), 1) if first else None,
        "over_pp": _over(result, reference),
        "same_text": _same_text(result),
        "load_s": round(result.load_s, 1) if result.load_s is not None else None,
        "peak_mib": round(memory / 2**20) if memory is not None else None,
        "remark": f"{result.status}: {result.reason}" if result.status != "ok" else result.note,
    }


def _over(result: PeerResult, reference: PeerResult | None) -> float | None:
    mine, theirs = _by_prompt(result), _by_prompt(reference) if reference else {}
    ratios = [theirs[prompt] / mine[prompt] for prompt in mine if prompt in theirs and mine[prompt] > 0]
    return round(median(ratios), 3) if ratios else None


def _by_prompt(result: PeerResult) -> dict[str, float]:
    """Median time between tokens, seconds."""
    times: dict[str, list[float]] = {}
    for sample in result.samples:
        if sample.tbt_s is not None:
            times.setdefault(sample.prompt, []).append(sample.tbt_s)
    return {prompt: median(values) for prompt, values in times.items()}


def _same_text(result: PeerResult) -> str | None:
    if not result.agreement:
        return None
    differing = [index for index in result.agreement.values() if index is not None]
    if not differing:
        return "yes"
    total = len(result.agreement)
    return f"{total - len(differing)} of {total}; differs from token {min(differing)} on"
