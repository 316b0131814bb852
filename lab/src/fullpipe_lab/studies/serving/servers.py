"""The servers that are compared: how each is started, known to be ready, looked into, and ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from fullpipe.errors import FullpipeError, StationFailed, UsageError
from fullpipe.hub import resolve
from fullpipe.models.dtypes import STORED
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.threads import cores
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.known import PEERS
from fullpipe_lab.peers.weights import as_folder

MODEL_NAME = "measured"  # what every server calls the model
_START_S, _LEAVE_S = 600.0, 30.0
_LOOK_S = 0.05  # so often it is asked whether it is ready
_FOLLOW_S = 3.0  # what its children get once it has gone
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# vLLM's own /metrics has hundreds of lines; what shows where time and rows went is among these.
_COUNTED = ("_total", "_sum", "_count")


@dataclass(frozen=True)
class Setup:
    """What all have in common. folder: weights and tokenizer, as transformers writes them. file: the GGUF file that
    they were made of, if anybody reads it. more: options for ours."""

    folder: Path
    draft: str
    dtype: str
    max_len: int
    max_seqs: int
    more: tuple[str, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Contender:
    """options: put behind the command, in which {draft} stands for the setup's. environment: beside the user's.
    stored: reads the setup's GGUF file and computes in its weights as they are. native: computes so in the folder's."""

    name: str
    title: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    stored: bool = False
    native: bool = False

    @property
    def ours(self) -> bool:
        return not self.name.startswith("vllm")

    @property
    def ready_path(self) -> str:
        return "/ready" if self.ours else "/health"

    def command(self, setup: Setup, port: int) -> list[str]:
        own = self.options if not self.ours else (*(one.format(draft=setup.draft) for one in self.options), *setup.more)
        # vLLM's own command `vllm` does not start in the build for CPUs: it looks for a package called vllm.
        program = ((sys.executable, "-m", "fullpipe", "serve") if self.ours else
                   (str(envs.interpreter("vllm")), "-m", "vllm.entrypoints.openai.api_server"))
        model, dtype = setup.file if self.stored else setup.folder, setup.dtype
        dtype = STORED if self.stored or self.native else dtype
        return [*program, "--model", str(model), "--served-model-name", MODEL_NAME, "--dtype", dtype,
                "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(setup.max_len),
                "--max-num-seqs", str(setup.max_seqs), *own]

    def variables(self) -> dict[str, str]:
        """Thread counts are for each program to find; nobody fetches anything."""
        values = {key: value for key, value in os.environ.items() if key not in _THREAD_VARIABLES}
        values |= {"HF_HUB_OFFLINE": "1", **self.environment}
        if not self.ours and (library := envs.root() / "vllm" / PEERS["vllm"].preload).exists():
            values["LD_PRELOAD"] = str(library)
        return values


_STAGES = ("--stages", "2")
_DRAFT, _PLAIN = ("--draft", "{draft}", *_STAGES), ("--method", "pp", "--draft", "none", *_STAGES)
_VLLM = ("--uvicorn-log-level", "warning")
_VLLM_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_ALL_CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))

CONTENDERS = {one.name: one for one in (
    Contender("fullpipe-stored", "Fullpipe, with the draft, weights as the GGUF file stores them", _DRAFT, stored=True),
    Contender("pp-stored", "Fullpipe, `--method pp`, weights as the GGUF file stores them", _PLAIN, stored=True),
    Contender("fullpipe-native", "Fullpipe, with the draft, on its own kernels", _DRAFT, native=True),
    Contender("fullpipe", "Fullpipe, with the draft, on torch", _DRAFT),
    Contender("pp", "Fullpipe, `--method pp`, on torch", _PLAIN),
    Contender("vllm", "vLLM, computing on all cores", _VLLM,
              _VLLM_VARIABLES | {"VLLM_CPU_OMP_THREADS_BIND": _ALL_CORES}),
    Contender("vllm-auto", "vLLM, as it binds threads by itself (a core is left to its web server)", _VLLM,
              _VLLM_VARIABLES),
)}


# ---- the weights -----------------------------------------------------------------------------------------


def shared_folder(model: str, dtype: str, place: Path) -> Path:
    """One folder that both read: the weights as vLLM gets them in `fullpipe-lab peers`, and our tokenizer.

    model: a GGUF file by path or catalogue name, whose weights are rounded to the dtype; or a folder, taken as it is.
    """
    path = resolve(model)
    if path.is_dir():
        return path
    weights, tokenizer = as_folder(path, dtype), load_tokenizer(path)
    place.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(weights / name)
    ends = sorted(tokenizer.eos_ids)
    generation = json.loads((weights / "generation_config.json").read_text()) | {"eos_token_id": ends}
    (place / "generation_config.json").write_text(json.dumps(generation))
    tokenizer.backend.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "eos_token": tokenizer.tokens[json.loads((weights / "config.json").read_text())["eos_token_id"]]}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    if tokenizer.template is None:
        raise UsageError(f"{model} has no chat template", hint="The comparison asks /v1/chat/completions.")
    (place / "chat_template.jinja").write_text(tokenizer.template.source)
    return place


# ---- a server that runs ----------------------------------------------------------------------------------


@dataclass
class Running:
    """contender's process and where it answers. load_s: from its start until it was ready."""

    contender: Contender
    process: subprocess.Popen[bytes]
    url: str
    command: list[str]
    load_s: float = 0.0

    def version(self) -> str:
        try:
            return str(httpx.get(f"{self.url}/version", timeout=10).json()["version"])
        except (httpx.HTTPError, ValueError, LookupError):
            return "unknown"

    def counters(self) -> dict[str, float]:
        """Every counter of its /metrics (sums and counts of histograms too), by name and labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        return read_counters(text)

    def cpu(self) -> dict[str, float]:
        """Processor seconds of each of its processes so far, by what the process is."""
        used: dict[str, float] = {}
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used[f"{_role(self.process.pid, process)} ({process.pid})"] = times.user + times.system
        return used

    def processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []


def read_counters(text: str) -> dict[str, float]:
    return {_name(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
            if sample.name.endswith(_COUNTED) and "le" not in sample.labels}


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What went up, and by how much; what stayed is left out."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value > before.get(name, 0.0)}


def _name(name: str, labels: Mapping[str, str]) -> str:
    kept = {key: value for key, value in labels.items() if key not in ("model_name", "engine")}
    return name + ("{" + ",".join(f"{key}={value}" for key, value in sorted(kept.items())) + "}" if kept else "")


def _role(root: int, process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if process.pid == root:
        return "server"
    return "worker" if "fullpipe.pipeline.worker" in line else line.split("/")[-1].split(" ")[0][:40] or process.name()


@contextmanager
def running(contender: Contender, setup: Setup, log: Path) -> Iterator[Running]:
    """The server, ready. Whatever it has started has ended when this has.

    Raises StationFailed when it ends or does not become ready, with the end of its log.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = contender.command(setup, port)
    with log.open("ab") as file:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                   env=contender.variables(), start_new_session=True)  # Ctrl-C is for us alone
    server = Running(contender, process, f"http://127.0.0.1:{port}", command)
    try:
        _await_ready(server, log)
        server.load_s = time.monotonic() - begun
        yield server
    finally:
        _end(server)


def _await_ready(server: Running, log: Path) -> None:
    until = time.monotonic() + _START_S
    while True:
        if (code := server.process.poll()) is not None:
            raise _failed(server, f"ended with code {code}", log)
        with suppress(httpx.HTTPError):
            if httpx.get(server.url + server.contender.ready_path, timeout=5).status_code == 200:
                return
        if time.monotonic() > until:
            raise _failed(server, f"is not ready after {_START_S:g} s", log)
        time.sleep(_LOOK_S)


def _failed(server: Running, reason: str, log: Path) -> FullpipeError:
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
    return StationFailed(server.contender.name, " | ".join([reason, *last]), hint=f"{log} has all that it said.")


def _end(server: Running) -> None:
    """SIGTERM to the server; what is left of it and its children after a while, by force."""
    others = server.processes()[1:]
    server.process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(_LEAVE_S)
    server.process.kill()
    server.process.wait()
    _, left = psutil.wait_procs(others, timeout=_FOLLOW_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_LEAVE_S)


def gguf_of(model: str, names: Sequence[str]) -> Path | None:
    """The GGUF file that a model is; None where none of these wants it. Raises UsageError where it is a folder."""
    if not (wanting := [name for name in names if CONTENDERS[name].stored]):
        return None
    if (path := resolve(model)).is_dir():
        raise UsageError(f"{wanting[0]} serves a GGUF file, and {model} is a folder",
                         hint="Name a GGUF model, or contenders that share a dtype.")
    return path


def machine_notes() -> dict[str, Any]:
    return {"cores_used": cores(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}


def missing(names: Sequence[str]) -> str:
    """Why these cannot be compared here, "" if they can."""
    if unknown := [name for name in names if name not in CONTENDERS]:
        return f"no contender is called {unknown[0]!r}; known are {', '.join(CONTENDERS)}"
    if any(not CONTENDERS[name].ours for name in names) and envs.interpreter("vllm") is None:
        return "vLLM is not installed; `python -m fullpipe_lab.peers transformers vllm` does it"
    if any(not CONTENDERS[name].ours for name in names) and not shutil.which("g++"):
        return "vLLM compiles for the CPU with g++, which is not installed"
    return ""
