"""Whole slices on the native kernels: rows have the same bits whatever their company, slots, threads and level."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullpipe.errors import DamagedModel, UsageError
from fullpipe.kernels import ASKED, CacheKind, Form, Kernels, load
from fullpipe.models import dtypes
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.dtypes import pick_dtype, sizes_in
from fullpipe.models.files import ModelFiles
from fullpipe.models.forms import kept_tensor
from fullpipe.models.native.slice import NativeSlice, padded_head, slot_bytes
from fullpipe.models.paths import step_of_paths
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe.options import BLOCK
from tiny import VOCAB, save, tiny_model, write_gguf

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

Kind = gguf.GGMLQuantizationType
SLOTS = 640
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 160}


@pytest.fixture(scope="module")
def native() -> Kernels:
    found = load()
    assert found is not None
    return found


# Heads of 16 numbers, of an odd size, and of the sizes that attention has loops of its own for, in odd groups.
MODELS = [("llama", Kind.Q4_0, WIDE), ("qwen2", Kind.Q8_0, WIDE), ("llama", Kind.BF16, WIDE),
          ("qwen3", Kind.F16, WIDE | {"head_dim": 40}),
          ("qwen3", Kind.Q5_1, WIDE | {"head_dim": 64, "num_attention_heads": 5, "num_key_value_heads": 1}),
          ("qwen3", Kind.Q8_0, WIDE | {"head_dim": 128, "num_attention_heads": 3, "num_key_value_heads": 1})]


@pytest.fixture(scope="module", params=MODELS, ids=lambda of: f"{of[0]} {of[1].name} {of[2].get('head_dim', 16)}")
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    family, kind, changes = request.param
    path = tmp_path_factory.mktemp("quantised") / "m.gguf"
    return open_model(write_gguf(tiny_model(family, **changes), path, kind=kind))


def loaded(native: Kernels, files: ModelFiles, cache: str = "float16") -> NativeSlice:
    return NativeSlice(native, files, 0, files.config.num_layers, has_embedding=True, has_head=True, slots=SLOTS,
                       cache=cache)


@pytest.fixture(scope="module")
def whole(native: Kernels, files: ModelFiles) -> NativeSlice:
    return loaded(native, files)


@pytest.fixture(scope="module", params=["float16", "int8", "float32"])
def cached(native: Kernels, files: ModelFiles, request: pytest.FixtureRequest) -> NativeSlice:
    return loaded(native, files, request.param)


def fill(part: NativeSlice, text: list[int], slots: list[int]) -> None:
    """Let a text stand in these slots."""
    part.forward(Step.of_text(torch.tensor(text), np.array(slots, np.int32)))


def step(part: NativeSlice, tokens: list[int], paths: list[list[int]]) -> torch.Tensor:
    return part.logits(part.forward(step_of_paths(torch.tensor(tokens), paths)))


def text_step(text: list[int]) -> Step:
    return Step.of_text(torch.tensor(text), np.arange(len(text), dtype=np.int32))


def test_it_says_nearly_what_float32_says(files: ModelFiles, cached: NativeSlice) -> None:
    """Rows in int8 and what the cache rounds are the difference; an error of order would be as large as the logits."""
    exact = DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=torch.float32,
                         slots=SLOTS)
    wanted, found = (part.logits(part.forward(text_step(TEXT))) for part in (exact, cached))
    rounded = files.is_quantised or cached.cache == CacheKind.INT8
    assert (found - wanted).std() < (0.08 if rounded else 0.001) * wanted.std()


TEXT = [5, 17, 3, 80, 41, 41, 9, 63, 22, 70, 1, 12]


@settings(max_examples=25)
@given(data=st.data(), width=st.integers(1, 40), threads=st.integers(1, 2))
def test_a_row_has_the_same_bits_whatever_its_company_slots_threads_and_level(
        native: Kernels, cached: NativeSlice, data: st.DataObject, width: int, threads: int) -> None:
    """Rows are guesses for the next token after a text, and some of the token after the first of them."""
    fill(cached, [*TEXT, 7], list(range(13)))
    behind, alone = step(cached, [8], [[*range(14)]]), step(cached, [7], [[*range(13)]])
    slots = data.draw(st.permutations(range(SLOTS - 64, SLOTS)) if data.draw(st.booleans()) else
                      st.permutations(range(224, 288)))  # of two blocks
    level = data.draw(st.sampled_from(native.levels))
    known, new = slots[:12], slots[12 : 12 + width]
    deep = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
    deep[0] = False
    at = data.draw(st.integers(0, width - 1))
    tokens = [7] + [8 if i == at else data.draw(st.integers(0, VOCAB - 1)) for i in range(1, width)]
    reads = [[*known, new[0], new[i]] if deep[i] else [*known, new[i]] for i in range(width)]
    torch.set_num_threads(threads)
    try:
        with native.at(level):
            fill(cached, TEXT, list(known))
            found = step(cached, tokens, reads)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], alone[0])
    if deep[at]:
        assert torch.equal(found[at], behind[0])


def test_a_head_in_int8_is_rounded_to_a_scale_of_its_own(native: Kernels, files: ModelFiles) -> None:
    exact, rounded = loaded(native, files, "float32"), loaded(native, files, "int8")
    for part in (exact, rounded):
        fill(part, TEXT, list(range(len(TEXT))))
    config, size = files.config, padded_head(files.config)
    heads = slice(config.kv_heads if config.qkv_bias else 0, None)  # keys are kept without their bias
    first = (0, 0, heads, slice(len(TEXT)))  # the first layer's
    x, found = exact._kv[first].view(torch.float32).numpy(), rounded._kv[first]
    most = np.abs(x).max(-1, keepdims=True)
    assert np.array_equal(found[..., :size].view(torch.int8).numpy(), np.rint(x * (np.float32(127) / most)))
    assert np.array_equal(found.view(torch.float32)[..., size // 4, None].numpy(), most / np.float32(127))
    assert slot_bytes(native, config, "int8") * BLOCK * config.num_layers == rounded._kv[0].nbytes


@pytest.mark.parametrize(("head_dim", "heads"), [(24, 2), (64, 2), (128, 2), (64, 5)])
def test_a_large_bias_of_keys_costs_int8_no_precision(native: Kernels, tmp_path: Path, head_dim: int,
                                                             heads: int) -> None:
    """Models of Qwen2 have it: a few numbers of each key are a hundred times the others."""
    model = tiny_model("qwen2", **WIDE | {"hidden_size": heads * head_dim, "num_attention_heads": heads,
                                          "num_key_value_heads": 1})
    with torch.no_grad():
        bias = model.model.layers[0].self_attn.k_proj.bias
        bias[2] = 100 * bias.std()
    files = open_model(save(model, tmp_path))
    first, other = (NativeSlice(native, files, 0, 1, has_embedding=True, has_head=False, slots=SLOTS, cache=cache)
                    for cache in ("float32", "int8"))
    exact, rounded = first.forward(text_step(TEXT)), other.forward(text_step(TEXT))
    assert (rounded - exact).std() < 0.02 * exact.std()  # of two heads with the bias in them 0.025 to 0.036
    for level in native.levels:
        with native.at(level):
            assert torch.equal(other.forward(text_step(TEXT)), rounded)


@pytest.mark.parametrize("cache", ["float16", "float32", "int8"])
def test_what_only_pretends_to_be_written_can_be_read(native: Kernels, files: ModelFiles, cache: str) -> None:
    part = loaded(native, files, cache)
    empty = part.forward(step_of_paths(torch.tensor([7]), [[*range(13)]]))
    part.pretend(13)
    noisy = part.forward(step_of_paths(torch.tensor([7]), [[*range(13)]]))
    assert noisy.isfinite().all() and not torch.equal(noisy, empty)


def test_a_cut_changes_no_bit(native: Kernels, files: ModelFiles, whole: NativeSlice) -> None:
    halves = [NativeSlice(native, files, 0, 2, has_embedding=True, has_head=False, slots=SLOTS),
              NativeSlice(native, files, 2, files.config.num_layers, has_embedding=False, has_head=True, slots=SLOTS)]
    x = torch.tensor(TEXT)
    for part in halves:
        x = part.forward(text_step(TEXT).with_x(x))
    wanted = whole.forward(text_step(TEXT))
    assert torch.equal(x, wanted) and torch.equal(halves[1].logits(x), whole.logits(wanted))


@pytest.mark.parametrize("changes", [
    {"spans": [[0, 11, 0, 0]]}, {"spans": [[0, 14, 0, 0]]}, {"spans": [[0, 13, 0, 1]]}, {"spans": [[-1, 12, 0, 0]]},
    {"reads": [*range(12), SLOTS]}, {"reads": [-1, *range(1, 13)]}, {"slots": [3]}, {"positions": [13]},
], ids=["too short", "beyond", "too long", "before", "no such slot", "a slot below 0", "not itself", "position"])
def test_what_reads_no_whole_path_is_our_mistake_and_changes_nothing(whole: NativeSlice,
                                                                     changes: dict[str, list[int]]) -> None:
    fill(whole, TEXT, list(range(12)))
    right = Step.of_text(torch.tensor([7]), np.arange(13, dtype=np.int32), 12)
    wanted = whole.forward(right)
    arrays = {name: np.array(value, getattr(right, name).dtype) for name, value in changes.items()}
    wrong = replace(right, x=torch.tensor([9]), **arrays)
    with pytest.raises(AssertionError):
        whole.forward(wrong)
    with pytest.raises(AssertionError):
        wrong.check(SLOTS)
    assert torch.equal(whole.forward(right), wanted)


def test_slots_that_nobody_uses_take_no_memory(native: Kernels, files: ModelFiles) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    part = NativeSlice(native, files, 0, 5, has_embedding=True, has_head=True, slots=1 << 20)
    fill(part, TEXT, list(range(12)))
    assert part.slots * 5 * 2 * 2 * 16 * 2 > 300 << 20
    assert resident() - before < 64 << 20


def test_scales_that_are_not_finite_are_damage(native: Kernels, files: ModelFiles) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    entry = files._entry("blk.1.ffn_down.weight", name)  # type: ignore[attr-defined]
    damaged = files.path.with_name("damaged.gguf")
    raw = bytearray(files.path.read_bytes())
    raw[entry.offset : entry.offset + 2] = b"\x80\x7f" if entry.kind == Kind.BF16 else b"\x00\x7c"
    damaged.write_bytes(raw)
    with pytest.raises(DamagedModel, match="down_proj"):
        NativeSlice(native, open_model(damaged), 0, 5, has_embedding=False, has_head=False)


def test_weights_stay_as_they_are_stored(native: Kernels, files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    fast = native.level != "portable" or bool(os.environ.get(ASKED))
    assert (pick_dtype("auto", files=files) == "stored") == fast
    assert pick_dtype("float32", files=files) == "float32" and pick_dtype("stored", files=files) == "stored"
    with pytest.raises(UsageError, match="for the processor"):
        pick_dtype("stored", "cuda:0", files)
    sizes, wide = sizes_in(files, "stored"), sizes_in(files, "bfloat16")
    assert sizes.row_bytes == 2 * wide.row_bytes
    assert sizes.layer_bytes < wide.layer_bytes if files.is_quantised else sizes.layer_bytes > 0


def test_where_torch_has_units_for_bfloat16_it_computes_in_that(files: ModelFiles,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    if not files.is_quantised:
        assert files.is_half and pick_dtype("auto", files=files) != "stored"


def test_without_the_library_weights_are_widened(files: ModelFiles, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dtypes, "load", lambda: None)
    dtypes._has_fast_kernels.cache_clear()
    try:
        assert pick_dtype("auto", files=files) in ("bfloat16", "float32")
        assert ("not built" in caplog.text) == files.is_quantised
        with pytest.raises(UsageError, match="not built"):
            pick_dtype("stored", files=files)
    finally:
        dtypes._has_fast_kernels.cache_clear()


def test_a_folder_of_safetensors_too(native: Kernels, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save(tiny_model("qwen2"), tmp_path_factory.mktemp("folder"))
    files = open_model(folder)
    assert not files.is_quantised
    part = NativeSlice(native, files, 0, 1, has_embedding=True, has_head=False)
    assert part.forward(text_step([3])).isfinite().all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_weights_may_be_quantised_while_they_are_read(native: Kernels, tmp_path_factory: pytest.TempPathFactory,
                                                      dtype: str) -> None:
    """It says what float32 says with the weights that are left."""
    model, folder = tiny_model("qwen2", **WIDE), tmp_path_factory.mktemp("floats")
    files = open_model(save(model, folder / "before"))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim == 2:
                values.copy_(torch.from_numpy(left(native, kept_tensor(files, name, dtype).form, values.numpy())))
    after, layers = open_model(save(model, folder / "after")), files.config.num_layers
    found = NativeSlice(native, files, 0, layers, has_embedding=True, has_head=True, slots=SLOTS, dtype=dtype)
    exact = DecoderSlice(after, 0, layers, has_embedding=True, has_head=True, dtype=torch.float32, slots=SLOTS)
    wanted, got = (part.logits(part.forward(text_step(TEXT))) for part in (exact, found))
    assert (got - wanted).std() < 0.08 * wanted.std()


def left(native: Kernels, kind: Kind, x: np.ndarray) -> np.ndarray:
    """What quantising leaves of a matrix."""
    assert kind in (Kind.Q8_0, Kind.Q4_1)
    out = np.empty((len(x), native.row_bytes(Form[kind.name], x.shape[1])), np.uint8)
    native.anew(Form[kind.name], x.ctypes.data, *x.shape, out.ctypes.data)
    return gguf.quants.dequantize(out, kind)
