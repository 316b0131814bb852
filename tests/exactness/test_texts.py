"""What a model says is what a user reads, to the last byte, at every door, whatever kind of tokenizer it has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from command import run
from tokenizers import decoders

from chain import write_chain
from fullpipe import LLM, SamplingParams
from fullpipe.assembly import assemble
from fullpipe.errors import UsageError
from fullpipe.options import Options
from fullpipe.server.app import ServedModel, create_app
from fullpipe.service import Service

SPECIAL = ["<unk>", "<s>", "</s>", "<|mid|>"]


def byte_fallback(words: list[str]) -> Any:
    """As Llama 2's."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "x", "▁", "▁x", *words]
    tokens = list(dict.fromkeys(tokens))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: id_ for id_, token in enumerate(tokens)}, [("▁", "x")],
                                                         unk_token="<unk>", byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Prepend("▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    return backend


def metaspace(words: list[str]) -> Any:
    """As T5's."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -1.0) for word in [*SPECIAL, "▁x", *words]], 0))
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def wordpiece(words: list[str]) -> Any:
    """As BERT's."""
    vocabulary = {word: id_ for id_, word in enumerate([*SPECIAL, "x", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.Whitespace(), decoders.WordPiece()
    return backend


@dataclass
class Said:
    """words: what the model says after the prompt "x". text: how that reads. stops: and where it may be cut. offsets:
    characters before each word, and before the end token."""

    make: Any
    words: list[str]
    text: str
    stops: list[str]
    offsets: list[int]


def of_bytes(text: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in text.encode()]


KINDS = {
    "byte fallback": Said(
        byte_fallback, ["Hi", "▁", *of_bytes("😀"), "▁and", *of_bytes("中"), "!", *of_bytes("é"), "ok"],
        "Hi 😀 and中!éok", ["😀", "中", "!é", "éo", "é", "😀 a", "ok"],
        [0, 2, 3, 3, 3, 3, 4, 8, 8, 8, 9, 10, 10, 11, 13]),
    "metaspace": Said(metaspace, ["▁Hé", "llo", "▁中", "▁", "▁!"], " Héllo 中  !", ["é", "o 中", "  ", " H", "!"],
                      [0, 3, 6, 8, 9, 11]),
    "wordpiece": Said(wordpiece, ["hello", "##ing", ",", "it", "'s", "中"], " helloing, it's 中",
                      ["oi", ", i", "'s", " h", "中"], [0, 6, 9, 10, 13, 15, 17]),
}


@dataclass
class Doors:
    """Asks one model at all of them."""

    said: Said
    folder: Path
    llm: LLM
    service: Service[Any]

    def texts(self, stop: str | None = None) -> set[tuple[str, str]]:
        """Text and reason of its end, of all doors."""
        params = SamplingParams(stop=(stop,) if stop else ())
        whole, chunks = self.llm.generate("x", params)[0], list(self.llm.stream("x", params))
        last = chunks[-1].completion
        assert last is not None
        found = {(whole.text, whole.finish_reason), (last.text, last.finish_reason),
                 ("".join(chunk.text for chunk in chunks), last.finish_reason)}
        arguments = ["generate", "x", "-m", self.folder, "--draft", "none", "--no-chat-template"]
        printed = run(*arguments, "--json", *(("--stop", stop) if stop else ()))
        told = json.loads(printed.stdout)
        found.add((told["text"], told["finish_reason"]))
        if stop is None:
            found.add((run(*arguments).stdout.removesuffix("\n"), "stop"))
        more = {"stop": stop} if stop else {}
        [answer] = self.ask(**more)
        streamed = [event["choices"][0] for event in self.ask(stream=True, **more)]
        found.add((answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]))
        found.add(("".join(choice["text"] for choice in streamed), streamed[-1]["finish_reason"]))
        return found

    def ask(self, path: str = "/v1/completions", **more: Any) -> list[Any]:
        """The server's answer, or the events of its stream."""
        body = {"model": "m", "max_tokens": 30, "temperature": 0, "prompt": "x"} | more
        content = asyncio.run(self._post(path, body))
        if not body.get("stream"):
            return [json.loads(content)]
        return [json.loads(line[6:]) for line in content.split("\n") if line.startswith("data: {")]

    async def _post(self, path: str, body: dict[str, Any]) -> str:
        app = create_app(self.service, ServedModel(["m"], self.llm.tokenizer, self.llm.max_model_len))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.post(path, json=body)).text


def doors_of(said: Said, folder: Path) -> Iterator[Doors]:
    backend = said.make([*dict.fromkeys(said.words)])
    backend.add_special_tokens([token for token in SPECIAL if token != "<unk>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    prompt = backend.encode("x").ids
    says = [prompt[-1], *map(backend.token_to_id, said.words), backend.token_to_id("</s>")]
    write_chain(folder, backend, says, config={"eos_token_id": says[-1]})
    made = assemble(Options.of(model=str(folder), draft="none"), lambda line: None)
    with LLM(folder, draft="none") as llm, closing(Service(made.pipeline, made.method, made.prepared)) as service:
        yield Doors(said, folder, llm, service)


@pytest.fixture(scope="module", params=KINDS)
def doors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    yield from doors_of(KINDS[request.param], tmp_path_factory.mktemp("says"))


def test_all_doors_say_what_the_model_says(doors: Doors) -> None:
    assert doors.texts() == {(doors.said.text, "stop")}


def test_a_stop_string_ends_it_before_itself(doors: Doors) -> None:
    for stop in doors.said.stops:
        before, found, _ = doors.said.text.partition(stop)
        assert found and doors.texts(stop) == {(before, "stop")}


def test_log_probabilities_know_bytes_and_places(doors: Doors) -> None:
    [answer] = doors.ask(logprobs=0)
    streamed = [told for event in doors.ask(logprobs=0, stream=True) if (told := event["choices"][0]["logprobs"])]
    assert answer["choices"][0]["logprobs"]["text_offset"] == doors.said.offsets
    assert [offset for told in streamed for offset in told["text_offset"]] == doors.said.offsets
    tokens = [doors.llm.tokenizer.backend.token_to_id(word) for word in doors.said.words]
    assert b"".join(map(doors.llm.tokenizer.token_bytes, tokens)).decode() == doors.said.text


def test_the_bytes_of_all_tokens_are_those_of_each(doors: Doors) -> None:
    tokenizer = doors.llm.tokenizer
    count = tokenizer.vocab_size + 2  # some ids have no token
    assert tokenizer.bytes_of_all(count) == [tokenizer.token_bytes(token) for token in range(count)]


# Special tokens.


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    said = Said(byte_fallback, ["Hi", "<|mid|>", "ok", "!"], "Hiok!", [], [])
    yield from doors_of(said, tmp_path_factory.mktemp("marked"))


def test_special_tokens_are_left_out_or_kept(marked: Doors) -> None:
    assert marked.texts() == {("Hiok!", "stop")}
    kept = "Hi<|mid|>ok!"
    assert marked.llm.generate("x", SamplingParams(skip_special_tokens=False))[0].text == kept
    printed = run("generate", "x", "-m", marked.folder, "--draft", "none", "--no-chat-template",
                  "--no-skip-special-tokens")
    assert printed.stdout == f"{kept}\n"
    assert marked.ask(skip_special_tokens=False)[0]["choices"][0]["text"] == kept
    assert marked.ask(skip_special_tokens=True)[0]["choices"][0]["text"] == "Hiok!"


def test_a_stop_string_that_is_a_special_token_stops_at_it(marked: Doors) -> None:
    assert marked.texts("<|mid|>") == {("Hi", "stop")}
    params = SamplingParams(stop="<|mid|>o", skip_special_tokens=False)
    assert marked.llm.generate("x", params)[0].text == "Hi"


def test_an_end_token_stops_as_a_stop_string_where_it_does_not_by_itself(marked: Doors) -> None:
    params = SamplingParams(stop="</s>", ignore_eos=True)
    assert [(one.text, one.finish_reason) for one in marked.llm.generate("x", params)] == [("Hiok!", "stop")]


@pytest.mark.parametrize(("more", "param"), [
    ({"stop": "<|mid|>\n"}, "stop"), ({"stop": ["a", "\n</s>"]}, "stop"),
    ({"stop_token_ids": [9999]}, "stop_token_ids"),
])
def test_a_stop_that_never_comes_is_refused(marked: Doors, more: dict[str, Any], param: str) -> None:
    with pytest.raises(UsageError) as caught:
        marked.llm.generate("x", SamplingParams(**more))
    assert caught.value.param == param
    if param == "stop":
        assert "can never match" in caught.value.message and "stop_token_ids=[" in str(caught.value.hint)
    for stream in (False, True):
        error = asyncio.run(marked._post("/v1/completions", {"model": "m", "prompt": "x", "stream": stream} | more))
        assert json.loads(error)["error"]["param"] == param
    if param == "stop" and isinstance(more["stop"], str):
        printed = run("generate", "x", "-m", marked.folder, "--draft", "none", "--no-chat-template", "--stop",
                      more["stop"])
        assert printed.exit_code == 2 and "stop_token_ids" in printed.stderr
        assert "--stop '<|mid|>'" in printed.stderr and "--no-skip-special-tokens" in printed.stderr
