"""Tiny random draft modules, and what one says to a row of tokens, computed the slow and obvious way."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from fullpipe.assembly import stage_ends
from fullpipe.models.config import ModelConfig
from fullpipe.models.rope import Rope
from fullpipe.models.spd_checkpoint import ModuleConfig, VerifierIdentity, identity_of, save_checkpoint
from fullpipe.models.spd_module import PipelineDraftModule
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from fullpipe.training.data import Sample
from fullpipe.training.trainer import Material

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 16, 4, 2, 8, 24, 8
TARGET = ModelConfig(
    family="llama", num_layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
    intermediate=24, vocab_size=VOCAB, rms_eps=1e-5, qkv_bias=False, o_bias=False, qk_norm=False, tied=True,
    max_positions=256, rope=Rope(inv_freq=tuple(100.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)),
                                 attention_factor=1.25))
_NOBODY = VerifierIdentity(name="tiny", architecture="LlamaForCausalLM", config_hash="c", tokenizer_hash="t")


@dataclass(frozen=True)
class Tiny:
    """A module in float32, with the target's embedding [vocab, hidden]."""

    config: ModuleConfig
    module: PipelineDraftModule
    embedding: Tensor

    @property
    def last(self) -> int:
        """The row type of complete tokens."""
        return len(self.config.bounds) - 1

    def logits(self, rows: Sequence[Tensor], types: Sequence[int]) -> Tensor:
        """Float32 [draft vocab]: what follows the last of these tokens. rows: [bounds, hidden] each, from the first
        token of the text on; types: of each, how many bounds are known, less one."""
        x = torch.stack([self.module.aggr_projs[kind].weight @ row[: kind + 1].flatten()  # type: ignore[operator]
                         for row, kind in zip(rows, types, strict=True)])
        for layer in range(self.config.num_layers):
            x = self._layer(x, layer)
        head = self.module.lm_head.weight if self.module.lm_head is not None else self.module.head_rows
        return head @ self._norm(x[-1], self.module.final_norm)

    def _layer(self, x: Tensor, index: int) -> Tensor:
        """Each row looks at itself and at all before it."""
        weights = {name: value.detach() for name, value in self.module.spec_layers[index].named_parameters()}
        keys: list[Tensor] = []
        values: list[Tensor] = []
        out = []
        for position, row in enumerate(x):
            normed = self._norm(row, weights["input_layernorm.weight"])
            query = self._head("q", weights, normed, position)
            keys.append(self._head("k", weights, normed, position).repeat_interleave(HEADS // KV_HEADS, 0))
            values.append(self._project("v", weights, normed).repeat_interleave(HEADS // KV_HEADS, 0))
            scores = (torch.stack(keys) * query).sum(-1) / math.sqrt(HEAD_DIM)  # [positions, heads]
            mixed = (scores.softmax(0)[..., None] * torch.stack(values)).sum(0).flatten()
            row = row + weights["self_attn.o_proj.weight"] @ mixed
            normed = self._norm(row, weights["post_attention_layernorm.weight"])
            gate, up = (weights[f"mlp.{name}_proj.weight"] @ normed for name in ("gate", "up"))
            out.append(row + weights["mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up))
        return torch.stack(out)

    def _head(self, name: str, weights: dict[str, Tensor], normed: Tensor, position: int) -> Tensor:
        """Queries or keys of one row, turned to their position: [heads, head_dim]."""
        x = self._project(name, weights, normed)
        if self.config.qk_norm:
            x = self._norm(x, weights[f"self_attn.{name}_norm.weight"])
        first, second = x.chunk(2, -1)
        angles = position * torch.tensor(TARGET.rope.inv_freq)
        turned = torch.cat((first * angles.cos() - second * angles.sin(),
                            second * angles.cos() + first * angles.sin()), -1)
        return turned * TARGET.rope.attention_factor

    def _project(self, name: str, weights: dict[str, Tensor], normed: Tensor) -> Tensor:
        bias = weights.get(f"self_attn.{name}_proj.bias", 0.0)
        return (weights[f"self_attn.{name}_proj.weight"] @ normed + bias).view(-1, HEAD_DIM)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_eps).sqrt() * weight


def tiny(layers: int = 1, *, kind: str = "spd", bounds: tuple[int, ...] = (0, 2, 4, 6, 8), seed: int = 0,
         **changes: Any) -> Tiny:
    """changes: of the `ModuleConfig`; a shared head by default."""
    config = ModuleConfig(**{
        "kind": kind, "hidden": HIDDEN, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate": 24,
        "rms_eps": 1e-5, "num_layers": layers, "bounds": bounds, "verifier_layers": LAYERS, "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB, "stages": ((2, 4, 6, 8),), "train_span": 1024, "verifier": _NOBODY,
        "shared_head": True, **changes})
    generator = torch.Generator().manual_seed(seed)
    module = PipelineDraftModule(config, TARGET)
    randomise(module, generator)
    module.adopt(1 + 0.2 * torch.randn(HIDDEN, generator=generator),
                 torch.randn(config.draft_vocab_size, HIDDEN, generator=generator) / 4 if config.shared_head else None)
    module.eval().requires_grad_(False)
    return Tiny(config, module, torch.randn(VOCAB, HIDDEN, generator=generator))


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Norms about one, matrices that keep the size of what goes through them."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise / math.sqrt(parameter.shape[-1]))


def random_checkpoint(target: Path, folder: Path, *, kind: str = "spd", stages: Sequence[int] = (5,),
                      bounds: tuple[int, ...] = (0, 1, 3, 5), layers: int = 1, seed: int = 0,
                      draft_ids: Sequence[int] | None = None) -> Path:
    """A module that knows nothing, in `folder`, for the model in folder `target`."""
    shape = open_model(target).config
    config = ModuleConfig(
        kind=kind, hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads,  # type: ignore[arg-type]
        head_dim=shape.head_dim, intermediate=shape.intermediate, rms_eps=shape.rms_eps, num_layers=layers,
        bounds=bounds, verifier_layers=shape.num_layers, vocab_size=shape.vocab_size,
        draft_vocab_size=shape.vocab_size if draft_ids is None else len(draft_ids),
        stages=tuple(stage_ends(shape, count) for count in stages), train_span=1024, qk_norm=shape.qk_norm,
        attention_bias=shape.qkv_bias, shared_head=draft_ids is None,
        verifier=identity_of(target, name="tiny", dtype="float32", tokenizer=load_tokenizer(target)))
    module = PipelineDraftModule(config, shape)
    randomise(module, torch.Generator().manual_seed(seed))
    save_checkpoint(folder, config, module.state_dict(), None if draft_ids is None else torch.tensor(draft_ids))
    return folder


def write_letters(folder: Path, ends: Sequence[int] = ()) -> Path:
    """A tokenizer for a folder with a model of 96 tokens: an end-of-text token, and printable characters. ends: tokens
    that end a text, in generation_config.json."""
    symbols = ["<|end|>", *map(chr, range(33, 127)), "Ġ"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(symbols[:1])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
    return folder


def material_of(target: Path, texts: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]] = ()) -> Material:
    """What a run learns from: all of these texts but the first token. The draft vocabulary is the whole one."""
    tokenizer, files = load_tokenizer(target), open_model(target)
    made = [Sample(np.array(text, np.int32), np.arange(len(text)) > 0, str(number))
            for number, text in enumerate((*texts, *held_out))]
    identity = identity_of(target, name="tiny", dtype="float32", tokenizer=tokenizer)
    return Material(files, made[: len(texts)], made[len(texts):], torch.arange(files.config.vocab_size),
                    tokenizer.eos_ids, identity, "tiny")
