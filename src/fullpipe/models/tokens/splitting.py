"""How a text is cut into words before BPE: what GGUF's `tokenizer.ggml.pre` stands for.

The names and what they cut are llama.cpp's, except for NFC, which Qwen's own tokenizer has and llama.cpp leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tokenizers


@dataclass(frozen=True, slots=True)
class Splitting:
    """patterns: each cuts the pieces that the ones before left; what it finds is a piece, and what lies between.
    nfc: text is brought into Unicode's composed form first. ignore_merges: a piece that is a token is taken as it is.
    add_bos: whether a plain text begins with the BOS token where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def apply(self, backend: Any) -> None:
        pre = tokenizers.pre_tokenizers
        cuts = [pre.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in self.patterns]
        backend.pre_tokenizer = pre.Sequence([*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        if self.nfc:
            backend.normalizer = tokenizers.normalizers.NFC()


_SPACES = r"\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English endings
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
_SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_LLAMA3 = f"{_SHORT}|{_LETTERS}|{_DIGITS}|{_SYMBOLS}"
_QWEN2 = f"{_SHORT}|{_LETTERS}|{_DIGIT}|{_SYMBOLS}"

# Words that begin at a change from small to capital letters; as in llama.cpp, only ASCII letters have a size.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED = (f"{_BEFORE}{_UPPER}*{_LOWER}+", f"{_BEFORE}{_UPPER}+{_LOWER}*")
_PATHS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
_TEKKEN = f"{_CASED[0]}|{_CASED[1]}|{_DIGIT}|{_PATHS}"
_GPT4O = f"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|{_DIGITS}|{_PATHS}"

_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CHINESE = r"[[一-龥ࠀ-一가-퟿]&&\S]+"  # the ranges hold spaces, which llama.cpp never finds by a range
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# Which names share a splitting.
_FAMILIES: dict[str, Splitting] = {
    "gpt-2 phi-2 mpt olmo jais trillion gigachat exaone4 a.x-4.0 mellum granite-docling": Splitting((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Splitting((_DIGIT, _GPT2)),
    "default": Splitting((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Splitting((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2":
        Splitting((_LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe glm4 chatglm-bpe": Splitting((_LLAMA3,)),
    "qwen2": Splitting((_QWEN2,), nfc=True),
    "deepseek-r1-qwen megrez kormo stablelm2 hunyuan solar-open grok-2": Splitting((_QWEN2,)),
    "qwen35": Splitting((
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{_DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",
    )),
    "tekken": Splitting((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Splitting((_GPT4O,)),
    "deepseek-llm": Splitting((r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟、。]+", r"\s+\z",
                               _CHINESE, r"\p{N}+")),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, _DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm": Splitting((_DIGITS, "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "jais-2": Splitting((
        rf"{_SHORT}|{_LETTERS}|{_DIGITS}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
        + "".join(rf"\s{{{count}}}(?!\S)|" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
        + r"\s",
    )),
    "bloom gpt3-finnish poro-chat": Splitting((_BLOOM,)),
    "viking": Splitting((_BLOOM, _DIGIT)),
    "superbpe": Splitting((r"\p{N}+", "(?=(?:[0-9]{3})+(?![0-9]))")),
    "bailingmoe bailingmoe2 llada-moe": Splitting((
        rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_SPACES}",
    )),
    "seed-coder": Splitting((rf"{_SHORT}|{_LETTERS}|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",)),
    "ufakzeka": Splitting((f"{_LETTERS}|{_DIGIT}|{_SYMBOLS}",)),
    "laguna": Splitting((r"[^\n]+|\n+", _QWEN2)),
    "exaone-moe": Splitting((
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|{_DIGIT}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
    )),
    "minicpm5": Splitting((_DIGITS, rf"{_SHORT}|{_LETTERS}|\p{{N}}+|{_SYMBOLS}"), ignore_merges=True),
    "youtu": Splitting((
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_SHORT}?|{_DIGIT}|{_PATHS}",
    ), ignore_merges=True),
}

SPLITTINGS = {name: splitting for names, splitting in _FAMILIES.items() for name in names.split()}
