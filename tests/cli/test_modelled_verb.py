"""`fullpipe modelled`: a table of what nobody has built."""

from __future__ import annotations

import json

import pytest
from command import run

FEW = ("modelled", "--tokens", "200", "--stages", "4,8", "--acceptance", "0.5,0.9")


def test_every_figure_is_called_modelled() -> None:
    result = run(*FEW, "--methods", "chain,fullpipe", "--width", "1,4")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0, result.output
    assert lines[0] == "Modelled speedup over pp:"
    assert lines[1].split() == ["STAGES", "ACCEPTANCE", "LINK", "MS", "DRAFT", "COST", "chain", "fullpipe", "fullpipe",
                                "(width", "4)"]
    assert len(lines) == 2 + 2 * 2
    assert all(line.count("x") == 3 and "(depth " in line for line in lines[2:])
    assert "modelled: equal stages" in result.stderr


def test_as_json_it_says_what_was_assumed() -> None:
    result = run(*FEW, "--methods", "pp,pipedec", "--link-ms", "0,20", "--stage-ms", "10", "--draft-cost", "0.5,1",
                 "--json")
    found = json.loads(result.stdout)
    assert found["clock"] == "modelled" and found["unit"] == "seconds" and "no model runs" in found["assumed"]
    assert len(found["points"]) == 2 * 2 * 2 * 2 * 2
    plain = [point for point in found["points"] if point["method"] == "pp"]
    assert {round(point["modelled_speedup"], 9) for point in plain} == {1.0}
    assert {round(point["modelled_tbt"], 9) for point in plain} == {0.04, 0.08, 0.1, 0.22}


@pytest.mark.parametrize(("options", "says"), [
    (("--link-ms", "5"), "Add --stage-ms"), (("--stage-ms", "0"), "--stage-ms must be above 0"),
    (("--stages", "four"), "--stages takes whole numbers"), (("--acceptance", "0.5,-1"), "--acceptance takes numbers"),
    (("--acceptance", "1.5"), "an acceptance must be in"), (("--methods", "magic"), "unknown method 'magic'"),
    (("--tokens", "1"), "tokens must be 2 or more"), (("--draft-cost", "nan"), "--draft-cost takes numbers"),
])
def test_what_cannot_be_modelled_is_refused(options: tuple[str, str], says: str) -> None:
    result = run("modelled", *options)
    assert result.exit_code == 2 and says in result.stderr and not result.stdout, result.output
