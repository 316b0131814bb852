"""What the frozen target makes of the training text: hidden states at some depths, and its own next tokens.

Computed by the code that decodes, so labels are those of the target as it will be served, quantisation included: a
module trained on another precision's labels agrees less with this one (notes, field.md section A-bis a).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.files import ModelFiles
from fullpipe.models.step import Step


class Teacher:
    """The target, read at some depths.

    taps: layers finished, rising, none of them 0; the last is the number of layers. max_length: of a text.
    """

    def __init__(self, files: ModelFiles, taps: Sequence[int], *, dtype: torch.dtype, max_length: int) -> None:
        assert list(taps) == sorted(set(taps)) and taps[0] > 0 and taps[-1] == files.config.num_layers
        self.config, self.taps, self.dtype = files.config, tuple(taps), dtype
        last = files.config.num_layers
        self._slices = [DecoderSlice(files, first, end, has_embedding=first == 0, has_head=end == last, dtype=dtype,
                                     slots=max_length)
                        for first, end in zip((0, *taps), taps)]

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: int64 [s]. Returns hidden states [s, taps, hidden] in the target's dtype, and the target's likeliest
        next token of every position, int64 [s]."""
        step, found = Step.of_text(tokens, np.arange(len(tokens), dtype=np.int32)), list[Tensor]()
        for part in self._slices:
            found.append(part.forward(step if not found else step.with_x(found[-1])))
        best = torch.cat([self._slices[-1].logits(rows).argmax(-1) for rows in torch.split(found[-1], 256)])
        return torch.stack(found, 1), best


class FeatureStore:
    """Features of samples, computed when they are first asked for and kept on disk after that.

    folder: where they are kept; what another store of the same description has left there is used. It takes
    2 bytes per number: tokens x taps x hidden x 2. key: names model, taps and text; another one's features are refused.
    """

    def __init__(self, folder: Path, teacher: Teacher, samples: Sequence[NDArray[np.int32]], key: str) -> None:
        assert teacher.dtype in (torch.bfloat16, torch.float32)
        self._teacher, self._samples = teacher, samples
        self._starts = np.cumsum([0, *(len(sample) for sample in samples)])
        with _writing(folder):
            self._claim(folder, key)
        total, width = int(self._starts[-1]), len(teacher.taps)
        done = folder / "done.bin"
        self._hidden = _Array(folder / "hidden.bin", (total, width, teacher.config.hidden), np.int16)
        self._best = _Array(folder / "best.bin", (total,), np.int32)
        if self._hidden.made or self._best.made:
            done.unlink(missing_ok=True)  # it speaks of files that are not there any more
        self._done = _Array(done, (len(samples),), np.uint8)

    @staticmethod
    def _claim(folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        description, fresh = folder / "features.json", folder / f".features.{os.getpid()}"
        claim = json.dumps({"key": key})
        if not description.exists():
            fresh.write_text(claim)
            os.replace(fresh, description)
        if description.read_text() != claim:
            raise UsageError(f"{folder} holds features of another model, other taps or another text",
                             hint="Name another folder, or delete this one.")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Hidden states bfloat16 [s, taps, hidden] and likeliest next tokens int64 [s] of a sample."""
        rows = self._rows(index)
        return torch.from_numpy(self._hidden.values[rows].astype(np.int16)).view(torch.bfloat16), self.best(index)

    def best(self, index: int) -> Tensor:
        """The latter alone."""
        return torch.from_numpy(self._best.values[self._rows(index)].astype(np.int64))

    def _rows(self, index: int) -> slice:
        """Where a sample stands, now that it does."""
        first, end = int(self._starts[index]), int(self._starts[index + 1])
        if not self._done.values[index]:
            hidden, best = self._teacher.read(torch.from_numpy(self._samples[index].astype(np.int64)))
            self._hidden.write(first, hidden.to(torch.bfloat16).view(torch.int16).numpy())
            self._best.write(first, best.numpy().astype(np.int32))
            self._done.write(index, np.ones(1, np.uint8))  # last: who is killed before computes the sample again
        return slice(first, end)


class _Array:
    """A file as an array, made of zeros (which take no room until they are written) if it is not there yet.

    values: what stands in it. made: it was not there, or of another size. A page of a mapped file that finds no room on
    the disk ends the process without a word, so numbers are written as files are.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._path, self.made = path, False
        with _writing(path.parent):
            if not path.exists() or path.stat().st_size != size:
                self.made = True
                with path.open("wb") as file:
                    file.truncate(size)
        self.values = np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def write(self, first: int, rows: NDArray[np.generic]) -> None:
        """Put `rows` in place of those from `first` on."""
        with _writing(self._path.parent), self._path.open("r+b", buffering=0) as file:
            file.seek(first * self.values.strides[0])
            left = rows.tobytes()
            while left:
                left = left[file.write(left) :]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot keep hidden states in {folder}: {error.strerror or error}",
                         hint="They take 2 bytes a number: tokens x taps x hidden size. Make room, or name a folder on "
                              "another disk (`features`); the same command then goes on.") from error


class Outer:
    """The frozen parts of the target around its layers: embedding, final norm, and head rows of some tokens."""

    def __init__(self, files: ModelFiles, draft_ids: Tensor, dtype: torch.dtype) -> None:
        config = files.config
        self.embedding = files.tensor("model.embed_tokens.weight", dtype)
        self.final_norm = files.tensor("model.norm.weight", torch.float32)
        head = self.embedding if config.tied else files.tensor("lm_head.weight", dtype)
        self.head_rows = head[draft_ids].clone()
        self._eps = config.rms_eps

    def to(self, device: torch.device) -> None:
        """Move what losses need; the embedding stays, for features are read where the teacher is."""
        self.final_norm, self.head_rows = self.final_norm.to(device), self.head_rows.to(device)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """The target's logits of the draft vocabulary: [rows, hidden] before the final norm -> float32 [rows, draft
        vocab]."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        normed = (wide * scale * self.final_norm).to(self.head_rows.dtype)
        return F.linear(normed, self.head_rows).float()
