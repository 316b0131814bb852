"""What streams is what decodes at once, for every kind of decoder, at every split, and it comes as early as can be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders

from fullpipe.errors import UnsupportedModel
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.text import Reply

DECODERS: dict[str, Any] = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "llama 2": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                  decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "early llama": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "bytes alone": decoders.ByteFallback(),
    "metaspace always": decoders.Metaspace(prepend_scheme="always"),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece as it stands": decoders.WordPiece(cleanup=False),
    "suffix": decoders.BPEDecoder(),
    "no suffix": decoders.BPEDecoder(suffix=""),
    "regex": decoders.Sequence([decoders.Replace(Regex("[▁b]+|^"), "_"), decoders.Fuse()]),
    "strip each": decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.ByteFallback()]),
    "strip ends": decoders.Sequence([decoders.Replace("▁", "b"), decoders.Strip("b", 1, 1)]),
    "strip runs": decoders.Sequence([decoders.ByteFallback(), decoders.Strip("b", 1, 2), decoders.Fuse()]),
    "replace in runs": decoders.Sequence([decoders.ByteFallback(), decoders.Replace("ab", ""),
                                          decoders.Replace("▁", " ")]),
    "metaspace in all": decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
    "metaspace in words": decoders.Sequence([decoders.BPEDecoder(), decoders.Sequence([decoders.Metaspace()])]),
}
# At the end of a text too: the library's own panics where nothing is left to strip, so it is asked for the text before.
STRIPPED: dict[str, tuple[Any, tuple[str, int, int]]] = {
    "strip all": (decoders.ByteLevel(), ("a", 2, 3)),
    "strip words": (decoders.Sequence([decoders.BPEDecoder(), decoders.Fuse()]), (" ", 3, 1)),
    "replace in all": (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("aba", "b")]),
                       ("b", 1, 1)),
}
DECODERS |= {kind: decoders.Sequence([before, decoders.Strip(*strip)]) for kind, (before, strip) in STRIPPED.items()}
BYTES = [0x61, 0xC3, 0xA9, 0xE2, 0x96, 0x81, 0xF0, 0x9F, 0x98, 0x80, 0xFF]
HALVES = ["ð", "Ł", "ĺ", "Ģ", "ĺĢ", "â", "ĸ", "ģ", "Ã", "©"]  # how byte-level tokens spell the bytes of 😀, ▁ and é
TEXTS = ["a", "b", "ab", "ba", "▁", "▁a", "a▁", "é", "中", "😀", *HALVES, "Ġa", "##b", "##", " ", "a</w>", "</w>",
         "b</w>a</w>b", "'s", ".", "do not", "\ufffd", "<0x+1>", "<0xé>", "", *(f"<0x{byte:02X}>" for byte in BYTES)]


def tokenizer_of(decoder: Any) -> Tokenizer:
    """Words that decoders do odd things to, and added tokens that may be skipped, or not, and look like all others."""
    words = [*TEXTS, "unknown"]
    vocabulary = {word: id_ for id_, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "unknown"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken("▁added", special=False), AddedToken("é▁", special=False)])
    backend.add_special_tokens(["</s>", "▁<s>", "<0xE2>", "##é"])  # one of them is in the vocabulary
    return Tokenizer(backend)


TOKENIZERS = {kind: tokenizer_of(decoder) for kind, decoder in DECODERS.items()}
LAST = max(TOKENIZERS["none"].tokens)
kinds = pytest.mark.parametrize("kind", DECODERS)
some_ids = st.lists(st.integers(0, LAST + 1), max_size=14) | st.lists(
    st.sampled_from([*map(TEXTS.index, TEXTS[-len(BYTES):]), LAST, 0, 4]), max_size=14)


def said_by(stream: Any, ids: Sequence[int]) -> str:
    return "".join([*map(stream.push, ids), stream.finish()])


def library(kind: str, ids: Sequence[int], skip: bool) -> str:
    """The library's text, with only the broken bytes of a run replaced: it is given runs that are already mended."""
    backend = TOKENIZERS[kind].backend
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    texts = [text for text in map(backend.id_to_token, ids) if text is not None and not (skip and text in special)]
    decoder, strip = STRIPPED.get(kind, (backend.decoder, None))
    if decoder is None or (kind not in STRIPPED and b"ByteFallback" not in decoder.__getstate__()):
        return str(backend.decode(list(ids), skip_special_tokens=skip))
    text = str(decoder.decode(list(mended(texts)) if b"ByteFallback" in decoder.__getstate__() else texts))
    return text if strip is None else stripped(text, *strip)


def stripped(text: str, content: str, start: int, stop: int) -> str:
    text = text[min(len(text) - len(text.lstrip(content)), start) :]
    return text[: len(text) - min(len(text) - len(text.rstrip(content)), stop)]


def mended(texts: Sequence[str]) -> Iterator[str]:
    for is_byte, run in groupby(texts, is_byte_token):
        if is_byte:
            yield from (f"<0x{byte:02X}>" for byte in mend(bytes(int(text[3:5], 16) for text in run)))
        else:
            yield from run


def is_byte_token(text: str) -> bool:
    return re.fullmatch(r"<0x([0-9A-F]{2}|\+\d)>", text) is not None


def mend(data: bytes) -> bytes:
    """Every byte that is of no character becomes U+FFFD, and the characters stay."""
    place, text = 0, ""
    while place < len(data):
        for size in range(1, 5):
            try:
                text += data[place : place + size].decode()
            except UnicodeDecodeError:
                continue
            place += size
            break
        else:
            place, text = place + 1, text + "\ufffd"
    return text.encode()


@pytest.mark.parametrize("kind", sorted(DECODERS.keys() - {"strip ends", "strip runs"}))
@given(some_ids, st.booleans())
def test_decoding_is_the_librarys(kind: str, ids: list[int], skip: bool) -> None:
    assert TOKENIZERS[kind].decode(ids, skip) == library(kind, ids, skip)


@kinds
@given(some_ids, st.booleans())
def test_a_stream_says_what_decode_says_at_every_split(kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    whole, prompt, certain = tokenizer.decode(ids, skip), tokenizer.stream((), skip), ""
    for split in range(len(ids) + 1):
        answer = tokenizer.stream(ids[:split], skip)
        assert certain + said_by(answer, ids[split:]) == whole
        certain += prompt.push(ids[split]) if split < len(ids) else ""


# These hold back a little more: a step does not know what the one before it holds, nor where a run of bytes ends.
LATE = {"no suffix", "strip all", "strip runs", "strip words", "replace in all", "replace in runs"}


@pytest.mark.parametrize("kind", sorted(DECODERS.keys() - LATE))
@given(st.lists(st.integers(0, LAST), max_size=5))
@settings(max_examples=30)
def test_what_is_certain_is_said_at_once(kind: str, ids: list[int]) -> None:
    """It is what all texts that may follow have in common."""
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.stream((), False)
    said = "".join(map(stream.push, ids))
    rest = [HALVES[1:4], HALVES[2:4], HALVES[6:8], *([f"<0x{byte:02X}>" for byte in BYTES[start:end]]
                                                   for start in range(len(BYTES)) for end in range(start + 4))]
    ends = [[], *([token] for token in range(LAST)), *(list(map(TEXTS.index, texts)) for texts in rest)]
    texts = [tokenizer.decode([*ids, *end], False) for end in ends]
    pairs = zip(min(texts), max(texts), strict=False)
    assert said == "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@given(st.lists(st.integers(0, LAST), max_size=8), st.lists(st.integers(0, LAST), max_size=4), st.booleans())
def test_a_long_prompt_is_not_read_from_its_beginning(prompt: list[int], answer: list[int], skip: bool) -> None:
    class Long(list[int]):
        read = 0

        def __getitem__(self, place: Any) -> Any:
            self.read += place.stop or len(self) - place.start if isinstance(place, slice) else 1
            return super().__getitem__(place)

    for kind in ("none", "byte level", "llama 2", "gemma", "metaspace always", "wordpiece", "suffix"):
        tokenizer = TOKENIZERS[kind]
        long = Long([0] * 5000 + prompt)
        said = said_by(tokenizer.stream(long, skip), answer)
        assert long.read < 60
        assert said == said_by(tokenizer.stream([0] * 20 + prompt, skip), answer)


@pytest.mark.parametrize(("kind", "texts", "pieces"), [
    ("llama 2", ["▁a", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁a", "<0xC3>", "<0xA9>", "b"],
     ["a", " ", "", "", "", "😀", " a", "", "é", "b", ""]),
    ("llama 2", ["<0xE2>", "<0x96>", "a", "<0xFF>", "<0x61>", "<0xC3>"], ["", "", "��a", "�", "a", "", "�"]),
    ("early llama", ["▁", "▁a", "<0xE2>", "<0x96>", "<0x81>"], ["", " a", "", "", " ", ""]),
    ("byte level", ["a", "ð", "Ł", "ĺĢ", "Ġa", "â", "b"], ["a", "", "", "😀", " a", "", "�b", ""]),
    ("byte level", ["中", "é", "a"], ["中", "", "�a", ""]),  # a token beyond the alphabet stands for itself
    ("metaspace always", ["▁a", "▁a"], ["a", " a", ""]),
    ("wordpiece", ["a", "##b", ".", "b", "'s"], ["a", "b", ".", " b", "'s", ""]),
    ("suffix", ["a", "a</w>", "</w>", "b</w>a</w>b"], ["a", "a", " ", " b", "ab"]),
    ("none", ["a", "b"], ["a", " b", ""]),
    ("strip ends", ["▁a", "ba", "ab", "b", "b</w>a</w>b", "a"],
     ["a", "a", "a", "", "</w>a</w>", "a", ""]),
    ("strip runs", ["<0x61>", "ba", "b", "<0x61>", "a▁"], ["a", "a", "", "a", "a▁", ""]),
    ("replace in all", ["a", "b", "b", "ab", "a", "a"], ["", "", "ab", "", "b", "", "ba"]),
])
def test_pieces(kind: str, texts: list[str], pieces: list[str]) -> None:
    stream = TOKENIZERS[kind].stream((), False)
    assert [*map(stream.push, map(TEXTS.index, texts)), stream.finish()] == pieces


@pytest.mark.parametrize(("kind", "prompt", "answer", "text"), [
    ("llama 2", [], ["▁a"], "a"), ("llama 2", ["▁a"], ["▁a"], " a"), ("llama 2", ["▁"], ["▁a"], " a"),
    ("llama 2", ["a", "<0xC3>"], ["<0xA9>", "b"], "éb"), ("byte level", ["a", "ð", "Ł"], ["ĺĢ"], "😀"),
    ("metaspace always", ["a"], ["▁a"], " a"), ("wordpiece", ["a"], ["b"], " b"), ("wordpiece", [], ["b"], "b"),
    ("suffix", ["a</w>"], ["a</w>"], " a"), ("none", ["a"], ["b"], " b"),
])
def test_a_continuation_depends_on_what_it_continues(kind: str, prompt: list[str], answer: list[str],
                                                     text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.stream([tokenizer.special["</s>"], *map(TEXTS.index, prompt)])  # a special one is no beginning
    assert said_by(stream, list(map(TEXTS.index, answer))) == text


@pytest.mark.parametrize("decoder", [
    decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Replace(Regex("a+"), "b")]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.ByteLevel()]),
    SimpleNamespace(__getstate__=lambda: b'{"type": "Quantum"}'),
])
def test_a_decoder_that_cannot_be_followed_is_refused_by_name(decoder: Any) -> None:
    backend = tokenizer_of(None).backend
    odd = SimpleNamespace(decoder=decoder, get_added_tokens_decoder=backend.get_added_tokens_decoder)
    with pytest.raises(UnsupportedModel, match="cannot be done token by token") as caught:
        Tokenizer(odd, name="odd")
    kind = re.findall(r'"type": ?"(\w+)"', decoder.__getstate__().decode())[-1]
    assert "odd" in str(caught.value) and f"{kind} at this place" in str(caught.value)


# Tokenizers as they come.


CORPUS = ["aé日🙂 aé aé日", "日 日a naïve", "🙂🙂 \n\n a"]


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet,
                                                                       show_progress=False))
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    """Built like Llama 2's."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: id_ for id_, word in enumerate(words)}, [("▁", "a")],
                                                         unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"),
                                                          tokenizers.normalizers.Replace(" ", "▁")])
    backend.decoder = DECODERS["llama 2"]
    return Tokenizer(backend)


def unigram() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer, backend.decoder = tokenizers.pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(CORPUS, tokenizers.trainers.UnigramTrainer(
        vocab_size=40, initial_alphabet=list("aé日🙂\u200d\ufffd\n"), show_progress=False))
    return Tokenizer(backend)


TRAINED = {"byte level": byte_level(), "byte fallback": byte_fallback(), "unigram": unigram()}


@pytest.mark.parametrize("kind", TRAINED)
@given(text=st.text("aé日🙂\u200d\ufffd \n", max_size=40))
def test_a_text_comes_back_and_never_half_a_character(kind: str, text: str) -> None:
    tokenizer, said, text = TRAINED[kind], "", f"a{text}"  # sentencepiece drops a space at the beginning
    stream = tokenizer.stream()
    for token in tokenizer.encode(text):
        said += stream.push(token)
        assert text.startswith(said)
    assert said + stream.finish() == text


# The bytes of single tokens.


@pytest.mark.parametrize("kind", ["none", "byte level", "llama 2", "gemma", "early llama", "metaspace always",
                                  "metaspace never", "wordpiece", "suffix", "regex"])
@given(some_ids)
def test_bytes_of_tokens_add_up_to_the_text_behind_another(kind: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    spelled = b"".join(map(tokenizer.token_bytes, ids))
    text = said_by(tokenizer.stream([0], skip_special_tokens=False), ids)
    if kind == "suffix":  # the last one's is no space
        text, spelled = text.replace(" ", ""), spelled.replace(b" ", b"")
    if "\ufffd" not in text:
        assert spelled == text.encode()


def test_a_token_reads_as_its_text_or_its_bytes() -> None:
    tokenizer = TOKENIZERS["llama 2"]
    read = {text: tokenizer.token_text(TEXTS.index(text)) for text in ("▁a", "<0xE2>", "<0x61>")}
    assert read == {"▁a": " a", "<0xE2>": r"\xe2", "<0x61>": "a"}
    assert tokenizer.token_text(tokenizer.special["</s>"]) == "</s>"
    assert tokenizer.token_text(LAST + 1) == ""


# Stop strings.


@kinds
@given(st.lists(st.integers(0, LAST), min_size=1, max_size=8), st.data())
@settings(max_examples=30)
def test_a_stop_string_cuts_the_text_that_decodes_at_once(kind: str, ids: list[int], data: st.DataObject) -> None:
    """Wherever tokens cut its characters, U+FFFD among them."""
    tokenizer = TOKENIZERS[kind]
    text = tokenizer.decode(ids)
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[start : start + data.draw(st.integers(1, 4))] or "x"
    reply = Reply(tokenizer.stream(), [stop])
    pieces = []
    for token in ids:
        reply.push(token)
        pieces.append(reply.fresh())
    reply.finish()
    assert "".join([*pieces, reply.fresh()]) == reply.text == text.partition(stop)[0]
