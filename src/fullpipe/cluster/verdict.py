"""A verdict says in plain words what the planner found, and why."""

from __future__ import annotations

from fullpipe.cluster.acceptance import Acceptance
from fullpipe.cluster.layout import Guesser
from fullpipe.cluster.planner import Candidate, Found
from fullpipe.cluster.survey import Survey

_LITTLE = 0.02  # of a time; less decides nothing


def verdict(found: Found, survey: Survey, guesser: Guesser | None) -> list[str]:
    """A few lines, the most important first."""
    lines = [_hosts(found, survey), _speculation(found, guesser)]
    if found.best.method == "fullpipe":
        lines.append(_slowest(found.best))
    if guesser is not None:
        lines.append(_believed(guesser.acceptance))
    return [line for line in lines if line]


def _hosts(found: Found, survey: Survey) -> str:
    best, here = found.best, found.here
    number = len(best.layout.order)
    others = len({*best.layout.order, *([best.layout.draft_host] if best.layout.draft_host else [])} - {survey.head})
    if len(survey.hosts) == 1:
        return f"{survey.head} takes {_ms(best.seconds)} a token"
    if number == 1 and not others:
        more = [one for one in found.by_hosts if len(one.layout.order) > 1]
        beside = min((one.seconds for one in more), default=None)
        return f"use one host: {survey.head} alone takes {_ms(best.seconds)} a token" + (
            f", the best of several {_ms(beside)}" if beside is not None else "")
    seats = f"{number} hosts" if number > 1 else f"the model on {best.layout.order[0]}"
    if here is None:
        return f"{seats}: {_ms(best.seconds)} a token"
    return f"{seats}: {_ms(best.seconds)} a token, {_times(here.seconds, best.seconds)} {survey.head} alone"


def _speculation(found: Found, guesser: Guesser | None) -> str:
    if guesser is None:
        return "no draft: nobody guesses"
    names = " and ".join(guesser.names)
    if found.best.method == "pp":
        guessing = f" (at best {_ms(found.guessing.seconds)} with {names})" if found.guessing else ""
        return f"do not speculate: guessing makes no layout here faster{guessing}"
    pp = f"plain pipeline parallelism takes {_ms(found.best.pp_seconds)} there"
    if found.pp.layout.order != found.best.layout.order:
        pp += f", and {_ms(found.pp.seconds)} at best, on {', '.join(found.pp.layout.order)}"
    return f"{names} {'guess' if len(guesser.names) > 1 else 'guesses'}, {found.best.method}: {pp}"


def _slowest(best: Candidate) -> str:
    """What the time goes into."""
    hit = best.mode.hit
    return (f"flights of up to {best.mode.width} rows, {best.mode.levels} levels of the tree in each; {hit:.0%} hits, "
            f"and a miss costs about {_ms(best.pp_seconds)}")


def _believed(acceptance: Acceptance) -> str:
    whose = "counted here" if acceptance.measured else "as usual for such drafts; none was counted yet"
    return f"the draft's best guess is taken to be right {acceptance.best:.0%} of the time ({whose})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _times(slow: float, fast: float) -> str:
    ratio = slow / fast
    if abs(ratio - 1) < _LITTLE:
        return "as fast as"
    return f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times as slow as"
