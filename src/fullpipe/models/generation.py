"""How a model's authors want it sampled: generation_config.json, or the sampling keys of a GGUF file. No torch.

Which keys count, and that a request may say otherwise, is as in vLLM (of a folder) and in llama.cpp (of a GGUF file).
Where `do_sample` is false, transformers leaves temperature and filters aside, and so do we; vLLM would not. Where it is
true and no temperature is named, that is 1, as transformers has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullpipe.errors import DamagedModel, UsageError
from fullpipe.models.gguf_header import read_header
from fullpipe.request import SamplingParams

_FILE = "generation_config.json"
_HF = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
       "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
_GGUF = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
         "penalty_repeat": "repetition_penalty"}
# Keys that change the text where they are honoured, and with which values they do not.
_HF_UNHEARD = {"num_beams": (1,), "typical_p": (1,), "no_repeat_ngram_size": (0,), "epsilon_cutoff": (0,),
               "eta_cutoff": (0,), "penalty_alpha": (0,), "bad_words_ids": ([],), "suppress_tokens": ([],),
               "begin_suppress_tokens": ([],), "sequence_bias": ({},), "forced_bos_token_id": (), "top_h": (),
               "forced_eos_token_id": (), "min_length": (0,), "min_new_tokens": (0,),
               "exponential_decay_length_penalty": (), "guidance_scale": (1,), "stop_strings": ([],),
               "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,), "diversity_penalty": (0,),
               "force_words_ids": ([],), "constraints": ([],), "watermarking_config": (), "token_healing": (False,),
               "dola_layers": (), "max_time": ()}
_GGUF_UNHEARD = {"mirostat": (0,), "xtc_probability": (0,), "penalty_last_n": (-1,)}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Generation:
    """The model's defaults: fields of `SamplingParams` that requests take where they say nothing.

    source: the file that has them. unheard: what else it asks for, which is not done.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    unheard: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} {value if isinstance(value, int) else f'{value:g}'}"
                         for name, value in self.params.items())

    def told(self) -> list[str]:
        """Lines on what is in force, and on what is not."""
        lines = []
        if self.params:
            lines.append(f"sampling where a request says nothing, from {self.source}: {self} "
                         "(`generation_config=none` leaves it aside)")
        if self.unheard:
            lines.append(f"warning: {self.source} also asks for {', '.join(self.unheard)}, which is not done")
        return lines


def sampling_of(path: Path, source: str = "auto") -> Generation:
    """The defaults for the model at `path`.

    source: "auto": as its own files say; "none" (vLLM: "vllm"): nothing; else a folder with a generation_config.json.

    Raises UsageError when that folder has none, DamagedModel for a value that cannot be.
    """
    if source in ("none", "vllm"):
        return Generation()
    if source == "auto":
        return _of_file(path / _FILE) if path.is_dir() else _of_gguf(path)
    given = Path(source)
    if not (file := given if given.name == _FILE else given / _FILE).is_file():
        raise UsageError(f"there is no {_FILE} in {source}",
                         hint="`generation_config` takes auto, none, or a folder that holds that file.")
    return _of_file(file)


def _of_file(file: Path) -> Generation:
    if not file.is_file():
        return Generation()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, f"it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise _damaged(file, "it holds no JSON object")
    found = {ours: values[key] for key, ours in _HF.items() if values.get(key) is not None}
    if values.get("do_sample") is False:
        found = {key: value for key, value in found.items() if key not in _SAMPLING}
    elif values.get("do_sample") is True:
        found.setdefault("temperature", 1.0)
    return Generation(_checked(found, file), file.name, _unheard(values, _HF_UNHEARD))


def _of_gguf(file: Path) -> Generation:
    prefix = "general.sampling."
    values = {key.removeprefix(prefix): value for key, value in read_header(file, arrays=False).metadata.items()
              if key.startswith(prefix)}
    found = {ours: _decimal(values[key]) for key, ours in _GGUF.items() if key in values}
    if found.get("repetition_penalty", 1) == 1:
        values.pop("penalty_last_n", None)  # of nothing
    return Generation(_checked(found, file), file.name, _unheard(values, _GGUF_UNHEARD))


def _decimal(value: Any) -> Any:
    """The number that was meant: GGUF keeps 0.95 as 0.949999988."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _unheard(values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple(key for key in neutral if values.get(key) is not None and values[key] not in neutral[key])


def _checked(found: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    for name, value in found.items():
        whole = name in ("top_k", "max_tokens")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise _damaged(file, f"{name} must be a {'whole ' if whole else ''}number (got {value!r})")
    try:
        SamplingParams(**found)
    except UsageError as error:
        raise _damaged(file, error.message) from error
    return found


def _damaged(file: Path, what: str) -> DamagedModel:
    return DamagedModel(f"the sampling defaults of {file} cannot be used: {what}",
                        hint="Mend the file, or leave it aside: `generation_config=none`.")
