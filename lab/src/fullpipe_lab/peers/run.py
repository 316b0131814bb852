"""Asking every peer the same questions, one peer at a time."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fullpipe.errors import UsageError
from fullpipe.hub import resolve
from fullpipe.models.dtypes import STORED, pick_dtype
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.tokenizer import Tokenizer, check_same_vocabulary
from fullpipe.prompts import FilePrompt
from fullpipe.request import SamplingParams
from fullpipe.threads import cores
from fullpipe_lab.files import Journal
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.known import PEERS, REFERENCE, Peer
from fullpipe_lab.peers.process import Runner, RunnerFailed
from fullpipe_lab.peers.records import PeerResult, PeerSample, first_difference
from fullpipe_lab.peers.weights import as_folder

Say = Callable[[str], None]
Keep = Callable[[list[PeerResult]], None]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SLACK, _ROUND = 64, 256  # room for guesses beyond the last token; contexts are multiples of this


@dataclass(frozen=True, slots=True)
class PeerModels:
    """Catalogue names, or paths of GGUF files or folders. Without a draft, peers that need one are left out."""

    target: str
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    task: str
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Job:
    """All that the peers have in common. threads: cores to compute on, shared among a peer's processes."""

    questions: list[Question]
    tokenizer: Tokenizer
    model: Path
    draft: Path | None
    max_tokens: int
    dtype: str
    threads: int
    repeats: int
    limit_s: float

    @property
    def max_len(self) -> int:
        longest = max(len(question.tokens) for question in self.questions)
        return math.ceil((longest + self.max_tokens + _SLACK) / _ROUND) * _ROUND


def run_peers(prompts: Sequence[FilePrompt], params: SamplingParams, models: PeerModels,
              which: Sequence[str] | None = None, progress: Say | None = None, keep: Keep | None = None, *,
              dtype: str = "bfloat16", threads: int | None = None, repeats: int = 1,
              limit_s: float = 600.0, journal: Journal | None = None) -> list[PeerResult]:
    """Each peer's result, in order. A peer that is missing or breaks is a result too, never an exception.

    prompts: their first turns, through the model's chat template if it has one. The token ids are made here, so that
    every peer answers the very same ones. Each peer answers the first prompt once before anything counts; then all
    prompts in turn, `repeats` times over.
    params: greedy; `max_tokens` is the only field that may be set.
    which: names of `PEERS`; None: all of them. `REFERENCE`'s texts are what the others' are compared with.
    progress: called with a line on what is being done. keep: called after each peer with the results so far, so that
    Ctrl-C loses no more than the peer that was being asked.
    dtype: of the peers that do not compute in the file's types.
    threads: default: every core that this process may use. limit_s: for loading, and for each answer.
    journal: of this very run, where an earlier one was cut off: peers that answered everything are not asked again.

    Raises UsageError for a wrong option or prompt, and ModelNotFound and its kin for the models.
    """
    peers = _chosen(which)
    if params != SamplingParams(max_tokens=params.max_tokens):
        raise UsageError("peers are compared greedily: max_tokens is the only sampling parameter they share",
                         hint="Leave the others at their defaults; random streams differ from program to program.")
    if repeats < 1 or (threads is not None and threads < 1) or limit_s <= 0 or not prompts:
        raise UsageError("prompts, repeats, threads and the time limit must be one or more",
                         hint="Leave an option out to get its default.")
    model, draft = resolve(models.target), resolve(models.draft) if models.draft else None
    tokenizer = load_tokenizer(model)
    if draft:
        check_same_vocabulary(tokenizer, load_tokenizer(draft))
    questions = [Question(one.id, one.category, _encode(tokenizer, one.text)) for one in prompts]
    job = Job(questions, tokenizer, model, draft, params.max_tokens, dtype, threads or cores(), repeats, limit_s)
    return measure_all(peers, job, progress or (lambda line: None), keep or (lambda results: None), journal)


def _chosen(which: Sequence[str] | None) -> list[Peer]:
    if unknown := [name for name in which or () if name not in PEERS]:
        raise UsageError(f"no peer is called {unknown[0]!r}", hint=f"Known are: {', '.join(PEERS)}.")
    return [PEERS[name] for name in dict.fromkeys(which if which is not None else PEERS)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.chat(text) if tokenizer.template else tokenizer.encode(text, add_special=True)


def measure_all(peers: Sequence[Peer], job: Job, say: Say, keep: Keep,
                journal: Journal | None = None) -> list[PeerResult]:
    """One at a time. What there is after each is handed to `keep`."""
    results: list[PeerResult] = []
    for peer in peers:
        if journal and peer.name in journal:
            say(f"{peer.name}: asked already")
            results.append(PeerResult.from_dict(journal.rows[peer.name]["result"]))
            continue
        results.append(measure(peer, job, say))
        if journal and results[-1].status == "ok":
            journal.add(peer.name, {"result": results[-1].to_dict()})
        keep(compare(results))
    return compare(results)


def compare(results: list[PeerResult]) -> list[PeerResult]:
    """The results, with where each text leaves the reference's (its first answer to each prompt)."""
    found = next((result for result in results if result.name == REFERENCE), None)
    reference = _first_answers(found) if found else {}
    return [replace(result, agreement={prompt: first_difference(tokens, reference[prompt])
                                       for prompt, tokens in _first_answers(result).items() if prompt in reference})
            for result in results]


def _first_answers(result: PeerResult) -> dict[str, list[int]]:
    return {sample.prompt: sample.tokens for sample in reversed(result.samples)}


# ---- one peer --------------------------------------------------------------------------------------------


def measure(peer: Peer, job: Job, say: Say) -> PeerResult:
    """What becomes of one peer. What it answered before it failed is kept."""
    result = PeerResult(peer.name, peer.title, note=peer.note)
    if lacking := _lacking(peer, job):
        result.status, result.reason = "missing", lacking
        say(f"{peer.name}: {lacking}")
        return result
    try:
        say(f"{peer.name}: loading")
        setup = _setup(peer, job)
        with Runner([_python(peer), str(peer.runner)], _environment(peer, setup["threads"])) as runner:
            _read_hello(result, runner.ask(setup, job.limit_s))
            runner.ask(_question(job.questions[0], job), job.limit_s)
            for sample in _samples(runner, job):
                result.samples.append(sample)
                say(f"{peer.name}: prompt {sample.prompt}, {len(sample.tokens)} tokens, {_told(sample.tbt_s)}")
            result.peak_rss_bytes = runner.peak_memory()
    except (RunnerFailed, OSError) as error:
        result.status, result.reason = "failed", str(error)
        say(f"{peer.name}: failed: {error}")
    return result


def _lacking(peer: Peer, job: Job) -> str:
    """Why this peer cannot be asked, "" if it can."""
    if peer.environment and envs.interpreter(peer.environment) is None:
        return f"not installed; `python -m fullpipe_lab.peers {peer.environment}` does it"
    if peer.needs_draft and job.draft is None:
        return "no draft model was named"
    if peer.weights == "gguf" and any(path.is_dir() for path in _models(peer, job)):
        return "reads GGUF files only"
    return ""


def _models(peer: Peer, job: Job) -> list[Path]:
    return [job.model, *([job.draft] if job.draft and peer.needs_draft else [])]


def _setup(peer: Peer, job: Job) -> dict[str, Any]:
    model, draft, dtype = job.model, job.draft, job.dtype
    if peer.weights == "folder":  # nobody but us computes in a GGUF file's weights as it stores them
        dtype = pick_dtype("auto") if dtype == STORED else dtype
        model = as_folder(model, dtype)
        draft = as_folder(draft, dtype) if draft and peer.needs_draft else None
    return {"model": str(model), "draft": str(draft) if draft else None, "dtype": dtype, "max_len": job.max_len,
            "threads": max(1, job.threads // peer.processes), "eos": sorted(job.tokenizer.eos_ids), **peer.setup}


def _python(peer: Peer) -> str:
    return str(envs.interpreter(peer.environment)) if peer.environment else sys.executable


def _environment(peer: Peer, threads: int) -> dict[str, str]:
    """Nobody fetches anything, and a thread count that the user has set for this process does not count."""
    values = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    if peer.environment and peer.preload and (library := envs.root() / peer.environment / peer.preload).exists():
        values["LD_PRELOAD"] = str(library)
    return values


def _question(question: Question, job: Job) -> dict[str, Any]:
    return {"prompt": question.tokens, "max_tokens": job.max_tokens}


def _samples(runner: Runner, job: Job) -> Iterator[PeerSample]:
    for repeat in range(job.repeats):
        for question in job.questions:
            yield _sample(question, repeat, runner.ask(_question(question, job), job.limit_s), job)


def _read_hello(result: PeerResult, hello: dict[str, Any]) -> None:
    version, load_s, settings = (hello.get(name) for name in ("version", "load_s", "settings"))
    if not (isinstance(version, str) and isinstance(load_s, float) and isinstance(settings, dict)):
        raise RunnerFailed("did not say its version, settings and loading time")
    result.version, result.load_s, result.settings = version, load_s, settings


def _sample(question: Question, repeat: int, answer: dict[str, Any], job: Job) -> PeerSample:
    tokens, times = answer.get("tokens"), answer.get("times")
    if not (isinstance(tokens, list) and isinstance(times, list) and len(tokens) == len(times) <= job.max_tokens
            and all(isinstance(token, int) for token in tokens)
            and all(isinstance(one, float) and math.isfinite(one) for one in times)
            and times == sorted(times) and (not times or times[0] >= 0)):
        raise RunnerFailed("gave an answer that is not a list of tokens and their rising times")
    # An end token is said by some and kept by others; it is no text.
    length = next((index for index, token in enumerate(tokens) if token in job.tokenizer.eos_ids), len(tokens))
    text = job.tokenizer.decode(tokens[:length])
    return PeerSample(question.id, question.task, repeat, tokens[:length], times[:length],
                      hashlib.sha256(text.encode()).hexdigest())


def _told(tbt_s: float | None) -> str:
    return f"{tbt_s * 1e3:.0f} ms between tokens" if tbt_s is not None else "too few for a time between tokens"
