"""Real clients ask a real server, each in an environment of its own: `make clients`.

    python tests/server/clients/run.py [NAME ...] [--keep FOLDER]

Environments lie in the cache beside those of the laboratory's peers, and are made once. A server is started for each
model that clients want: SmolLM2, or the smallest model whose template offers tools. Prints what each client tried and
what came of it, and ends with 1 where something went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from fullpipe.cli.console import print_table
from fullpipe.errors import FullpipeError
from fullpipe.hub import resolve
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.envs import Environment
from fullpipe_lab.studies.serving.processes import server_of, setup_of
from fullpipe_lab.studies.serving.servers import MODEL_NAME, running

HERE = Path(__file__).parent
SMALL, WITH_TOOLS = "smollm2-135m", "qwen2.5-coder-0.5b"
_LIMIT_S = 900.0
_CONTEXT, _SEQS = 2048, 8


@dataclass(frozen=True)
class Client:
    """script: in this folder. needs: what its environment is made of, pinned; the first is the client itself.
    imports: what must be importable there."""

    script: str
    needs: tuple[str, ...]
    imports: str
    model: str = WITH_TOOLS

    @property
    def packages(self) -> tuple[str, ...]:
        """Their names, without extras and versions."""
        return tuple(need.partition("==")[0].partition("[")[0] for need in self.needs)


CLIENTS = {
    "openai": Client("openai_client.py", ("openai==2.54.0",), "openai"),
    "langchain": Client("langchain_client.py", ("langchain-openai==1.7.4",), "langchain_openai"),
    "litellm": Client("litellm_client.py", ("litellm==1.110.2",), "litellm"),
    "llm": Client("llm_client.py", ("llm==0.36",), "llm"),
    "lm-eval": Client("lm_eval_client.py", ("lm-eval[api]==0.4.13", "transformers==5.24.0"),
                      "lm_eval, transformers", SMALL),
    "guidellm": Client("guidellm_client.py", ("guidellm==0.8.1",), "guidellm", SMALL),
}


@dataclass(frozen=True)
class Outcome:
    """What a client tried, and what went wrong: "" for nothing."""

    client: str
    tried: str
    fault: str


def interpreter_of(name: str) -> Path:
    """The Python of a client's environment, which is made if there is none. Raises FetchError."""
    client, own = CLIENTS[name], f"client-{name}"
    envs.ENVIRONMENTS[own] = Environment(client.needs, f"import {client.imports}", client.packages, large=True)
    envs.make(own)
    found = envs.interpreter(own)
    assert found is not None, "it has just been made"
    return found


def version_of(name: str) -> str:
    return envs.versions_of(f"client-{name}")[CLIENTS[name].packages[0]]


@contextmanager
def serving(model: str, folder: Path) -> Iterator[str]:
    """The address of a server that calls the model `MODEL_NAME`; its log lies in the folder."""
    setup = replace(setup_of(model, _CONTEXT, _SEQS), dtype="auto")
    with running(server_of("ngram", 1), setup, folder / "server.log") as server:
        yield server.url


def write_tokenizer(model: str, folder: Path) -> None:
    """The tokenizer of a model as transformers reads it, for clients that count tokens themselves."""
    tokenizer = load_tokenizer(resolve(model))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    end = tokenizer.tokens[min(tokenizer.eos_ids)]
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end,
        "pad_token": end, "chat_template": tokenizer.template.source if tokenizer.template else None}))


def outcomes(name: str, python: Path, url: str, folder: Path) -> list[Outcome]:
    """Run a client's script. folder: for what it writes; what it said lies there afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(CLIENTS[name].model, folder / "tokenizer")
    command = [str(python), str(HERE / CLIENTS[name].script), url, MODEL_NAME, str(folder)]
    with (folder / "output.txt").open("wb") as log:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, check=False,
                                  timeout=_LIMIT_S, env=os.environ | {"OPENAI_API_KEY": "none"})
            said, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            said, code = late.stdout or b"", -1
    return _read(name, said.decode(errors="replace"), code, folder)


def _read(name: str, said: str, code: int, folder: Path) -> list[Outcome]:
    """What the script told; one that ended by itself, before its end, is a fault too."""
    told = [json.loads(line) for line in said.splitlines() if line.startswith('{"tried":')]
    found = [Outcome(name, one["tried"], one["fault"]) for one in told]
    if code not in (0, 1) or (code == 1) != any(one.fault for one in found) or not found:
        why = f"not done after {_LIMIT_S:g} s" if code == -1 else f"it ended with {code}"
        found.append(Outcome(name, "the script", f"{why}; see {folder / 'output.txt'}"))
    return found


def run(names: Sequence[str], folder: Path) -> list[Outcome]:
    """Ask with each of these clients."""
    found = []
    for model, group in groupby(sorted(names, key=lambda name: CLIENTS[name].model), lambda name: CLIENTS[name].model):
        pythons = {name: interpreter_of(name) for name in group}  # before there is a server that would wait
        with serving(model, folder) as url:
            for name, python in pythons.items():
                print(f"{name} {version_of(name)} asks {model}", file=sys.stderr, flush=True)
                found += outcomes(name, python, url, folder / name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}; default: all")
    parser.add_argument("--keep", type=Path, help="keep here what clients and server wrote")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in CLIENTS]:
        parser.error(f"no client is called {unknown[0]!r}; known are {', '.join(CLIENTS)}")
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="fullpipe-clients-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = run(asked.names or list(CLIENTS), folder)
    except FullpipeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print_table(("CLIENT", "VERSION", "TRIED", "OUTCOME"),
                [(one.client, version_of(one.client), one.tried, one.fault or "good") for one in found])
    return 1 if any(one.fault for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
