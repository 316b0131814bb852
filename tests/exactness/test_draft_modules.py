"""Draft modules change no text, in either pipeline; and one that knows a text by heart guesses all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tiny
from fullpipe import LLM, SamplingParams
from fullpipe.assembly import prepare
from fullpipe.engine import Listener
from fullpipe.messages import Drafted, Event
from fullpipe.options import Options
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.training.plan import Plan
from fullpipe.training.trainer import Trainer
from simulated import simulated
from tiny_module import material_of, random_checkpoint, write_letters

LEARNT = (1, 17, 9, 33, 17, 9)
PROMPTS = ((5,), LEARNT, tuple(range(20, 50)))
PARAMS = (SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, temperature=1.0, seed=7),
          SamplingParams(max_tokens=2))
LONG = SamplingParams(max_tokens=60)
STAGES = (1, 2, 3, 5)
METHODS = (("spd", {}), ("spd", {"width": 3, "refresh": True}), ("fullpipe", {"width": 4}),
           ("fullpipe", {"width": 4, "refresh": True}))


@dataclass(frozen=True)
class Folders:
    """A target; modules that know nothing of it; and a module for 3 stages that knows its greedy text."""

    target: Path
    spd: Path
    deep: Path
    exit: dict[int, Path]
    heart: Path

    def named(self, draft: str, stages: int) -> str:
        """What `LLM` wants for "spd,ngram" and the like."""
        names = {"spd": f"spd:{self.spd}", "deep": f"spd:{self.deep}", "exit": f"exit:{self.exit[stages]}",
                 "heart": f"spd:{self.heart}", "ngram": "ngram"}
        return ",".join(names[name] for name in draft.split(","))


def open_llm(folders: Folders, stages: int, draft: str, **more: object) -> LLM:
    return simulated(folders.target, draft=draft, stages=stages, dtype="float32", **{"method": "spd", **more})


def answers(llm: LLM) -> list[list[int]]:
    return [llm.generate([prompt], params)[0].token_ids for params in PARAMS for prompt in PROMPTS]


def learn_by_heart(target: Path, text: Sequence[int], out: Path) -> Path:
    plan = Plan(stages=(3,), steps=600, warmup=10, rate=3e-3, precision="fp32", max_length=128, validation=0.0)
    out.mkdir()
    Trainer(plan, material_of(target, [text]), out).run(lambda *_: None)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    model = tiny.tiny_model("qwen2", seed=1, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # its choices are clear: who knows two equal ones by heart may say the other
    target = write_letters(tiny.save(model, root / "target"))
    with LLM(str(target), draft="none", method="pp", dtype="float32", threads=1) as llm:
        (said,) = llm.generate([LEARNT], LONG)
    return Folders(
        target,
        random_checkpoint(target, root / "spd", stages=STAGES, seed=1),
        random_checkpoint(target, root / "deep", stages=STAGES, bounds=(0, 2, 4), layers=2, draft_ids=range(3, 80)),
        {stages: random_checkpoint(target, root / f"exit{stages}", kind="exit", stages=[stages],
                                   bounds=(max(1, 5 // stages),)) for stages in STAGES},
        learn_by_heart(target, [*LEARNT, *said.token_ids], root / "heart"))


@pytest.fixture(scope="module")
def truth(folders: Folders) -> list[list[int]]:
    """What the target says by itself."""
    with open_llm(folders, 1, "none", method="pp") as llm:
        return answers(llm)


# ---- in one process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "draft"), [
    (1, "spd"), (1, "exit"), (1, "heart,ngram"), (2, "deep"), (2, "exit,ngram"), (3, "spd,ngram"), (3, "heart"),
    (5, "deep,ngram"), (5, "exit"), (5, "heart"),
])
def test_a_module_changes_no_text(folders: Folders, truth: list[list[int]], stages: int, draft: str) -> None:
    """3 stages do not divide 5 layers; 2 tokens do not fill 3 stages."""
    with open_llm(folders, stages, folders.named(draft, stages)) as llm:
        for method, options in (*METHODS, *([("ppsd", {})] if "exit" in draft else [])):
            llm.use(method, **options)  # type: ignore[arg-type]
            assert answers(llm) == truth, (method, options)


def test_who_knows_the_text_by_heart_is_hardly_ever_wrong(folders: Folders) -> None:
    with open_llm(folders, 3, f"spd:{folders.heart}") as llm:
        for method, refresh in (("spd", False), ("spd", True), ("fullpipe", False), ("fullpipe", True)):
            llm.use(method, refresh=refresh)
            (said,) = llm.generate([LEARNT], LONG)
            assert said.speculation["hit_rate"] > 0.9
            assert said.speculation["steps_per_token"] < 1.3


def test_several_ends_and_ends_within_the_pipeline(folders: Folders, tmp_path: Path) -> None:
    """What was guessed behind the end is not said, and the request is over at once."""
    with open_llm(folders, 1, "none", method="pp") as llm:
        (whole,) = llm.generate([LEARNT], LONG)
    said = whole.token_ids
    ends = [token for place, token in enumerate(said) if said.index(token) == place and place >= 8]
    first = min(said.index(end) for end in ends)
    assert len(ends) > 2 and first < 30
    folder = tmp_path / "ending"
    shutil.copytree(folders.target, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    drafts = [f"spd:{folders.heart}", f"spd:{folders.spd},ngram", f"exit:{folders.exit[3]}"]
    for draft, method in ((draft, method) for draft in drafts for method in ("spd", "fullpipe")):
        with simulated(folder, draft=draft, stages=3, dtype="float32", method=method) as llm:
            (one,) = llm.generate([LEARNT], SamplingParams(max_tokens=400))
            assert (one.token_ids, one.finish_reason) == (said[: first + 1], "stop"), (draft, method)
            (one,) = llm.generate([LEARNT], SamplingParams(max_tokens=60, ignore_eos=True))
            assert one.token_ids == said


def test_requests_that_share_the_pipeline(folders: Folders, truth: list[list[int]]) -> None:
    for draft in (f"spd:{folders.heart}", f"exit:{folders.exit[3]}"):
        with open_llm(folders, 3, draft, method="fullpipe", width=4, max_num_seqs=5) as llm:
            asked = [(prompt, params) for params in PARAMS for prompt in PROMPTS]
            said = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
            assert [one.token_ids for one in said] == truth


def test_a_run_without_the_draft_leaves_nothing_at_its_station(folders: Folders, truth: list[list[int]]) -> None:
    """`pp` on a pipeline whose stages tap: hidden states come, and nobody will ever ask about them."""
    with open_llm(folders, 3, f"spd:{folders.spd}", method="pp") as llm:
        assert answers(llm) == truth
        llm._service.call(lambda engine: engine.drain())
        assert not llm._service.engine.pipeline._taps._reader._arenas  # type: ignore[attr-defined]
        llm.use("spd")
        assert answers(llm) == truth


# ---- processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(folders: Folders) -> Iterator[Callable[..., LLM]]:
    """Makes pipelines of processes. pace: what their stations take at least."""
    made: list[LLM] = []

    def make(stages: int, draft: str, pace: dict[str, dict[int, float]] | None = None,
             listeners: Sequence[Listener] = (), **more: object) -> LLM:
        prepared = prepare(Options.of(model=str(folders.target), draft=draft, stages=stages, dtype="float32", **more))
        pipeline = WorkersPipeline(prepared.stages, prepared.draft, pace=pace)
        made.append(LLM.over(prepared, pipeline, clock="wall", listeners=listeners))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.mark.processes
def test_a_module_that_knows_a_text_by_heart_guesses_it_all_through_processes(
        folders: Folders, truth: list[list[int]], processes: Callable[..., LLM]) -> None:
    """The stages are slowed down to what real ones take, so that an answer of the draft comes before the next step."""
    answered: list[Drafted] = []
    listen: Callable[[Event], None] = lambda event: answered.append(event) if isinstance(event, Drafted) else None  # noqa: E731
    pace = {f"stage {number}": {1: 0.03, 64: 0.03} for number in range(3)}
    llm = processes(3, f"spd:{folders.heart}", method="spd", pace=pace, listeners=[listen])
    (said,) = llm.generate([LEARNT], LONG)
    assert said.speculation["hit_rate"] > 0.9
    assert said.speculation["steps_per_token"] < 1.5
    assert said.token_ids[:8] == truth[1]
    assert len(answered) >= 60


@pytest.mark.processes
@pytest.mark.parametrize(("stages", "draft"), [(3, "heart"), (1, "deep,ngram"), (2, "exit")])
def test_a_module_changes_no_text_through_processes(folders: Folders, truth: list[list[int]], stages: int, draft: str,
                                                    processes: Callable[..., LLM]) -> None:
    llm = processes(stages, folders.named(draft, stages), method="spd")
    for method, options in (*METHODS, ("ppsd", {}), ("pp", {})):
        llm.use(method, **options)  # type: ignore[arg-type]
        assert answers(llm) == truth, (method, options)
