"""Tokenizers: the same ids and texts as transformers, and text that streams without being torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from fullpipe.errors import DamagedModel, DraftMismatch, PromptError, UnsupportedModel, UsageError
from fullpipe.hub import resolve
from fullpipe.models.gguf_header import read_header
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.tokens.tokenizer import Tokenizer, check_same_vocabulary

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "", " ", "Hello, world!", "def f(x):\n    return x ** 2  # square\n", "  lead and trail  ", "x" * 300,
    "I'm sure you'll say they'd've'S GONE", "tabs\tand\r\nnewlines\n\n\n  x", "naïve café Ünïcödé",
    "日本語のテキスト 한국어 русский العربية", "🙂 👩\u200d👩\u200d👧 🇩🇪", "a1b22c333 3.14159 2024-01-01",
    "<|im_start|>user\nhi<|im_end|>", "https://example.org/?q=a&b=c#d", '{"key": [1, 2, {"a": null}]}',
    "\u00a0non\u2003breaking\u200bspaces",
]


def train(texts: list[str] = TEXTS, size: int = 400) -> Any:
    """A small byte-level BPE, as Qwen's is built."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(SPECIAL)
    return backend


@pytest.fixture(scope="module")
def backend() -> Any:
    return train()


def write_gguf(path: Path, backend: Any, **changes: Any) -> Path:
    """A GGUF file with this tokenizer, two rows of padding, and no weights."""
    model = json.loads(backend.to_str())["model"]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    values = {
        "model": "gpt2", "pre": "qwen2", "tokens": [*tokens, "[PAD1]", "[PAD2]"],
        "token_type": [*kinds, 5, 5],
        "merges": [" ".join(merge) for merge in model["merges"]], "eos_token_id": vocabulary["<|im_end|>"],
        "bos_token_id": vocabulary["<|endoftext|>"], "add_bos_token": False, **changes,
    }
    writer = gguf.GGUFWriter(path, "qwen2")
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            adders[type(value)](f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_directory(folder: Path, backend: Any, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def tiny(backend: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", backend))


# Against transformers.


@pytest.mark.weights
def test_qwen_encodes_as_transformers_does() -> None:
    from transformers import AddedToken, Qwen2Tokenizer

    path = resolve("qwen2.5-coder-0.5b")
    values = read_header(path, arrays=True).metadata
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    theirs = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens) if kinds[i] == 1},
        merges=[tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]],
    )
    added = [i for i, kind in enumerate(kinds) if kind in (3, 4)]
    theirs.add_tokens([AddedToken(tokens[i], special=kinds[i] == 3, normalized=False) for i in added])
    ours = load_tokenizer(path)
    assert ours.eos_ids == {151643, 151645, 151662, 151663, 151664}
    assert ours.vocab_size == len(theirs) == 151665
    for text in [*TEXTS, "½ ² ٣", "cafe\u0301"]:  # the last is in decomposed form
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.weights
def test_smollm_encodes_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    path = resolve("smollm2-135m")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = load_tokenizer(path)
    assert ours.eos_ids == {0, 2, 4}
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    # Its own tokenizer.json splits digits off before words, so that two spaces before a digit are one token
    # and a space never joins a digit; transformers' conversion of GGUF files leaves that step out.
    two_spaces = ours.encode("  ")
    assert len(two_spaces) == 1
    assert ours.encode("a  1") == [*ours.encode("a"), *two_spaces, *ours.encode("1")]


@pytest.mark.weights
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_chats_are_rendered_as_transformers_renders_them(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(resolve(name))
    assert ours.template is not None
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours.backend, chat_template=ours.template.source)
    user = {"role": "user", "content": "What is 2 + 2?"}
    system = {"role": "system", "content": "Be brief."}
    answered = [user, {"role": "assistant", "content": "4"}, user]
    for given_, ours_ids in (
        ([user], ours.chat("What is 2 + 2?")),
        ([system, user], ours.chat("What is 2 + 2?", system="Be brief.")),
        (answered, ours.chat(answered)),
    ):
        text = theirs.apply_chat_template(given_, add_generation_prompt=True, tokenize=False)
        assert ours_ids == ours.encode(text)


# GGUF files and directories.


def test_a_gguf_file_and_a_directory_make_the_same_tokenizer(
    tiny: Tokenizer, backend: Any, tmp_path: Path
) -> None:
    folder = write_directory(tmp_path / "model", backend)
    other = load_tokenizer(folder)
    assert tiny.tokens == other.tokens
    assert tiny.fingerprint == other.fingerprint
    check_same_vocabulary(tiny, other)
    # Cut at words that both ways to split agree on.
    for text in ("Hello, world!", "naïve café", *SPECIAL):
        assert tiny.encode(text) == other.encode(text)


def test_half_of_a_surrogate_pair_is_no_text(tiny: Tokenizer) -> None:
    with pytest.raises(PromptError, match="UTF-8"):
        tiny.encode("a\udcff")


def test_padding_is_no_token(tiny: Tokenizer, backend: Any) -> None:
    assert tiny.vocab_size == backend.get_vocab_size()
    assert "[PAD1]" not in tiny.tokens.values()
    assert tiny.decode(tiny.encode("[PAD1]")) == "[PAD1]"


def test_end_tokens_of_a_gguf_file(tiny: Tokenizer, backend: Any) -> None:
    assert {tiny.tokens[i] for i in tiny.eos_ids} == {"<|endoftext|>", "<|im_end|>"}


def test_end_tokens_of_a_directory(backend: Any, tmp_path: Path) -> None:
    folder = write_directory(
        tmp_path / "model", backend, config={"eos_token_id": 3}, generation_config={"eos_token_id": [3, 4]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}},
    )
    assert load_tokenizer(folder).eos_ids == {3, 4, backend.token_to_id("<|im_end|>")}


def test_special_tokens_are_no_text(tiny: Tokenizer) -> None:
    ids = tiny.encode("<|im_start|>Hello<|im_end|>")
    assert {tiny.tokens[ids[0]], tiny.tokens[ids[-1]]} == {"<|im_start|>", "<|im_end|>"}
    assert tiny.decode(ids) == "Hello"


def test_a_beginning_token_is_added_on_request(backend: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "bos.gguf", backend, add_bos_token=True))
    bos = backend.token_to_id("<|endoftext|>")
    assert tokenizer.encode("x", add_special=True) == [bos, *tokenizer.encode("x")]


@pytest.mark.parametrize("changes", [{"model": "bert"}, {"pre": "whitespace"}])
def test_an_unknown_kind_is_refused_by_name(changes: dict[str, Any], backend: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", backend, **changes)
    with pytest.raises(UnsupportedModel, match=repr(next(iter(changes.values())))):
        load_tokenizer(path)


def test_a_file_without_merges_is_damaged(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(DamagedModel, match=r"no tokenizer\.ggml\.merges"):
        load_tokenizer(write_gguf(tmp_path / "odd.gguf", backend, merges=None))


@pytest.mark.parametrize("keep", [3, 10, 1000])
def test_a_truncated_header_is_damaged(keep: int, backend: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "cut.gguf", backend)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedModel, match="is not that of a whole GGUF file"):
        load_tokenizer(path)


def test_another_version_of_the_format_is_refused(backend: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "old.gguf", backend)
    data = bytearray(path.read_bytes())
    data[4] = 1
    path.write_bytes(data)
    with pytest.raises(UnsupportedModel, match="GGUF version 1"):
        load_tokenizer(path)


def test_metadata_is_what_the_gguf_package_reads(backend: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "whole.gguf", backend)
    fields = gguf.GGUFReader(path).fields
    assert read_header(path, arrays=True).metadata == {
        key: value.contents() for key, value in fields.items() if not key.startswith("GGUF.")
    }


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [5, {"rag": "x"}, [{"name": "default", "template": 1}]])
def test_a_chat_template_that_is_no_text_is_damaged(template: Any, backend: Any, tmp_path: Path) -> None:
    write_directory(tmp_path, backend)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(DamagedModel, match="is no text"):
        load_tokenizer(tmp_path)


def test_a_chat_template_in_another_encoding_is_damaged(backend: Any, tmp_path: Path) -> None:
    write_directory(tmp_path, backend)
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'ä' }}".encode("latin-1"))
    with pytest.raises(DamagedModel, match="is not UTF-8"):
        load_tokenizer(tmp_path)


def test_null_lists_no_added_tokens(backend: Any, tmp_path: Path) -> None:
    write_directory(tmp_path, backend)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": null}')
    assert load_tokenizer(tmp_path).special


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_of_a_directory_are_named(name: str, backend: Any, tmp_path: Path) -> None:
    write_directory(tmp_path, backend)
    (tmp_path / name).write_text("{")
    with pytest.raises(DamagedModel, match=name):
        load_tokenizer(tmp_path)


# Chats that cannot be.


def test_a_model_without_a_template_says_what_to_do(backend: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_directory(tmp_path / "plain", backend))
    with pytest.raises(UsageError, match="plain has no chat template") as caught:
        tokenizer.chat("hi")
    assert caught.value.hint is not None
    assert "`use_chat_template=False`" in caught.value.hint and "`chat_template=FILE`" in caught.value.hint


def test_two_system_messages_are_refused(tiny: Tokenizer) -> None:
    with pytest.raises(UsageError, match="two system messages"):
        tiny.chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], system="c")


# The bytes of single tokens.


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_add_up_to_the_text(text: str, tiny: Tokenizer) -> None:
    assert b"".join(map(tiny.token_bytes, tiny.encode(text))) == text.encode()


def test_every_byte_is_the_bytes_of_a_token(tiny: Tokenizer) -> None:
    single = {said for said in map(tiny.token_bytes, tiny.tokens) if len(said) == 1}
    assert single == {bytes([byte]) for byte in range(256)}


def test_rows_of_padding_have_no_bytes(backend: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", backend))
    assert tokenizer.token_bytes(max(tokenizer.tokens) + 1) == b""


def test_bytes_of_sentencepiece_tokens() -> None:
    vocabulary = {"<unk>": 0, "▁né": 1, "<0xE2>": 2, "<0x0A>": 3, "</s>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["</s>"])
    said = [Tokenizer(backend).token_bytes(token) for token in (1, 2, 3, 4)]
    assert said == [" né".encode(), b"\xe2", b"\n", b"</s>"]


# Drafts.


def test_a_draft_with_another_vocabulary_is_refused(tiny: Tokenizer) -> None:
    other = Tokenizer(train(size=330), name="other")
    with pytest.raises(DraftMismatch) as caught:
        check_same_vocabulary(tiny, other)
    first = min(i for i in tiny.tokens if tiny.tokens[i] != other.tokens.get(i))
    said = str(caught.value)
    assert f"the draft other has another vocabulary than tiny: {other.vocab_size} tokens" in said
    assert f"token {first}, {other.tokens[first]!r} against {tiny.tokens[first]!r}" in said
    assert "`draft=ngram`" in said
    assert tiny.fingerprint != other.fingerprint
