"""The training loop of draft modules."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.models.files import ModelFiles
from fullpipe.models.spd_checkpoint import ModuleConfig, VerifierIdentity, hash_of, save_checkpoint
from fullpipe.models.spd_module import PipelineDraftModule
from fullpipe.training.batches import epoch_batches
from fullpipe.training.data import Sample
from fullpipe.training.features import FeatureStore, Outer, Teacher
from fullpipe.training.objective import Fillings, accepted, inverse
from fullpipe.training.parity import make_fixture
from fullpipe.training.plan import Plan
from fullpipe.training.state import load_state, save_state
from fullpipe.training.student import Batch, Student, make_batch

Report = Callable[[int, float, str], None]
"""Called after steps: the step, the share of the run that is done, and a line of figures."""

_DIVERGED = "Lower the learning rate (`rate`), or use `precision=fp32`. What was saved before is as it was."
_WINDOW = 50  # steps that a figure of the curve is the mean of
_STUCK_AFTER = 200  # steps, the warm-up not counted
_SCALE_SAMPLES, _SCALE_SKIP = 32, 4  # texts that the scale of features is taken from; tokens at their start left out
_TOP = 4


@dataclass(frozen=True, slots=True)
class Material:
    """What a run learns from. key: names model, text and settings of the text, for features kept on disk."""

    files: ModelFiles
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    draft_ids: Tensor
    eos: frozenset[int]
    identity: VerifierIdentity
    key: str


class Trainer:
    """One run in the folder `out`: out/state, out/features (unless they are kept elsewhere), and at the end the
    checkpoint in `out` itself.

    Raises `UsageError` for text whose labels are all masked, for a vocabulary without an end-of-text token, and while
    it runs when the loss is not finite or nothing is learnt; `MissingExtra` without accelerate.
    """

    def __init__(self, plan: Plan, material: Material, out: Path, *, save_every_s: float = 120.0,
                 features: Path | None = None, feature_taps: Sequence[int] = ()) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
        except ImportError as error:
            raise MissingExtra("training needs the extra 'train'", hint="pip install 'fullpipe[train]'") from error
        self.plan, self.material, self.out = plan, material, out
        self._save_every_s = save_every_s
        config = material.files.config
        _check_material(material)
        self.ends, bounds = plan.ends(config), plan.bounds_for(config)
        self.config = _module_config(plan, material, bounds, self.ends)
        self._fillings = Fillings(bounds, self.ends, plan.refreshed, plan.ahead, plan.power)
        if wrong := [tap for tap in feature_taps if not 0 < tap <= config.num_layers]:
            raise UsageError(f"there is no tap after {wrong[0]} layers: the target has {config.num_layers}")
        taps = sorted({bound for bound in bounds if bound} | {*feature_taps, config.num_layers})
        self._columns = [taps.index(bound) if bound else -1 for bound in bounds]
        compute = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        # It holds one precision for the whole process, and there may be runs of both: see `_autocast`.
        self._accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(),
                                        # A filling leaves out the row types that nothing in flight has.
                                        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
        rank = self._accelerator.process_index
        teacher = Teacher(material.files, taps, dtype=compute, max_length=plan.max_length)
        samples = [*material.held_out, *material.train]
        kept = features or out / "features"
        self._store = FeatureStore(kept.with_name(f"{kept.name}-{rank}") if rank else kept, teacher,
                                   [sample.tokens for sample in samples], hash_of({"key": material.key, "taps": taps}))
        self._tokens = [torch.from_numpy(sample.tokens.astype(np.int64)) for sample in samples]
        self._learn = [torch.from_numpy(sample.learn) for sample in samples]
        self._lengths = [len(sample.tokens) for sample in samples]
        self._outer = Outer(material.files, material.draft_ids, compute)
        self._epoch_number, self._order = 0, self._epoch(0)
        self._batches_per_epoch = len(self._order)
        torch.manual_seed(plan.seed)
        self.module = PipelineDraftModule(self.config, config)
        self.module.checkpointing = plan.checkpointing
        self._initialise(bounds)
        self._in_vocab = inverse(material.draft_ids, config.vocab_size)
        student = Student(self.module, self._outer, self._in_vocab.clone(), loss=plan.loss,
                          recompute_logits=plan.recompute_logits)
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=plan.rate, weight_decay=plan.weight_decay)
        self._optimizer = optimizer
        self._resume(load_state(out / "state", self.module, optimizer, self._check_settings))
        self._check_together()
        self._outer.to(self._accelerator.device)
        self._student, self._prepared = self._accelerator.prepare(student, optimizer)

    # ---- before the first step ---------------------------------------------------------------------------

    def _initialise(self, bounds: Sequence[int]) -> None:
        """Aggregation: the deepest tap as it is, and a little noise; layers: copies of the target's."""
        hidden, files = self.config.hidden, self.material.files
        with torch.no_grad():
            for projection in self.module.aggr_projs:
                torch.nn.init.normal_(projection.weight, std=0.01)  # type: ignore[arg-type]
                projection.weight[:, -hidden:] += torch.eye(hidden)  # type: ignore[index, operator]
            for layer, source in zip(self.module.spec_layers, self.plan.init_for(files.config)):
                for name, parameter in layer.named_parameters():
                    parameter.copy_(files.tensor(f"model.layers.{source}.{name}", torch.float32))
            if self.module.lm_head is not None:
                self.module.lm_head.weight.copy_(self._outer.head_rows.float())
        self.module.adopt(self._outer.final_norm, self._outer.head_rows if self.config.shared_head else None)
        self.module.scale_features(self._feature_scale())

    def _feature_scale(self) -> Tensor:
        """One over the size of every feature: float32 [bounds, hidden], from the first texts."""
        texts = range(min(_SCALE_SAMPLES, len(self._tokens)))
        rows = [self._batch([index]).features[0, _SCALE_SKIP:].float() for index in texts]
        size = torch.cat(rows).square().mean(0).sqrt()
        return (1 / (size + 0.1 * size.mean(-1, keepdim=True))).cpu()

    def _resume(self, state: dict[str, Any] | None) -> None:
        self.step, self._elapsed = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self._first: list[float] | None = None
        if state is not None:
            self.step, self._elapsed, self.curve = state["step"], state["elapsed_s"], state["curve"]
            self._first = state["first"]

    def _check_settings(self, state: dict[str, Any]) -> None:
        changed = [name for name, value in self._settings().items() if state["plan"].get(name) != value]
        if changed:
            raise UsageError(f"{self.out} holds a run with another setting: {', '.join(changed)}",
                             hint="Give the same options to go on with it, or name another folder.")

    def _settings(self) -> dict[str, Any]:
        """All that decides what comes out: it must be the same when a run goes on. key: of the text and the model."""
        return self.plan.to_dict() | {"key": self.material.key, "processes": self._accelerator.num_processes,
                                      "vocabulary": hash_of({"ids": self.material.draft_ids.tolist()})}

    def _check_together(self) -> None:
        """Every device reads the state for itself."""
        if self._accelerator.num_processes == 1:
            return
        from accelerate.utils import gather_object

        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise UsageError(f"the processes found states of different steps: {', '.join(map(str, steps))}",
                             hint=f"They must share the folder {self.out}; a copy on each machine is not enough.")

    # ---- the loop ----------------------------------------------------------------------------------------

    def run(self, report: Report) -> dict[str, Any]:
        """Train to the end, write the checkpoint, and return its training summary. Raises `UsageError` while another
        process trains in the same folder."""
        with self._alone():
            return self._run(report)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.leads:
            yield
            return
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.out / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise UsageError(f"another process trains in {self.out}",
                             hint="Wait for it, or name another folder.") from error

    def _run(self, report: Report) -> dict[str, Any]:
        begun, saved, recent = time.monotonic() - self._elapsed, time.monotonic(), _Recent()
        while (done := self._agreed(self._progress(time.monotonic() - begun))) < 1:
            loss, counts, tokens = self._step(done)
            self.step += 1
            recent.add(loss, counts, tokens * self._accelerator.num_processes)
            self._elapsed = time.monotonic() - begun
            self._check_progress(recent)
            if self.step % _WINDOW == 0:
                self.curve.append({"step": self.step, "elapsed_s": round(self._elapsed, 1)} | recent.figures())
            report(self.step, done, recent.line())
            if time.monotonic() - saved > self._save_every_s:
                self._save()
                saved = time.monotonic()
        self._save()
        summary = self._summary()
        if self.leads:
            self._write(summary)
        self._accelerator.wait_for_everyone()
        return summary

    def _progress(self, elapsed: float) -> float:
        """How much of the run is done, 1 at its end."""
        plan, shares = self.plan, [0.0]
        if plan.steps:
            shares.append(self.step / plan.steps)
        if plan.minutes:
            shares.append(elapsed / (60 * plan.minutes))
        if plan.passes:
            batches = self.step * plan.accumulate * self._accelerator.num_processes
            shares.append(batches / (plan.passes * self._batches_per_epoch))
        return max(shares)

    def _agreed(self, done: float) -> float:
        """What the first device says, so that all take the same number of steps."""
        if self._accelerator.num_processes == 1:
            return done
        from accelerate.utils import broadcast_object_list

        said: list[float] = broadcast_object_list([done])
        return said[0]

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Batches of one pass over the training samples, which come after the held-out ones."""
        first = len(self.material.held_out)
        batches = epoch_batches(self._lengths[first:], self.plan.batch_tokens, self.plan.seed, epoch)
        return [[first + index for index in batch] for batch in batches]

    def _indices(self, number: int) -> list[int]:
        """The samples of the run's batch `number`, counted over all devices."""
        epoch, place = divmod(number, self._batches_per_epoch)
        if epoch != self._epoch_number:
            self._epoch_number, self._order = epoch, self._epoch(epoch)
        return self._order[place % len(self._order)]  # epochs differ by a batch or two

    def _step(self, done: float) -> tuple[float, Tensor, int]:
        """Loss, counts of `Student.forward`, and tokens, of this device."""
        plan, devices, rank = self.plan, self._accelerator.num_processes, self._accelerator.process_index
        rate = plan.rate * min(1.0, (self.step + 1) / max(1, plan.warmup)) * max(0.02, 1 - done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        numbers = [(self.step * plan.accumulate + part) * devices + rank for part in range(plan.accumulate)]
        batches = [self._indices(number) for number in numbers]
        shares = self._shares(batches)
        total, counts, tokens = 0.0, torch.zeros(3, dtype=torch.int64), 0
        for number, indices, share in zip(numbers, batches, shares):
            filling = self._fillings.draw(random.Random(f"{plan.seed}/{number}"))
            with self._autocast():
                loss, found = self._student(self._batch(indices), filling)
            tokens += sum(self._lengths[index] for index in indices)
            self._accelerator.backward(loss * share)
            total += loss.item() * share
            counts += found
        norm = self._accelerator.clip_grad_norm_(self._student.parameters(), plan.clip)
        if not math.isfinite(norm):
            raise UsageError(f"the gradient of step {self.step + 1} is not finite", hint=_DIVERGED)
        self._prepared.step()
        self._prepared.zero_grad()
        return total, counts, tokens

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16")

    def _shares(self, batches: Sequence[Sequence[int]]) -> list[float]:
        """What each of this device's batches counts in the step. The step's loss is the mean over all of its labels,
        on all devices, so it does not matter into how many batches they are cut. (The devices' gradients are averaged,
        not summed, so the shares of all devices add up to the number of devices.)"""
        labels = torch.tensor([sum(self._labels(index) for index in batch) for batch in batches])
        whole, devices = labels.sum(), self._accelerator.num_processes
        if devices > 1:
            whole = self._accelerator.reduce(whole.to(self._accelerator.device), "sum").cpu()
        shares: list[float] = (labels * (devices / max(1, int(whole)))).tolist()
        return shares

    def _labels(self, index: int) -> int:
        """How many of a sample's labels are in the draft vocabulary."""
        return int((self._learn[index][1:] & (self._in_vocab[self._store.best(index)[:-1]] >= 0)).sum())

    def _batch(self, indices: Sequence[int]) -> Batch:
        batch = make_batch(indices, self._tokens, self._learn, self._store, self._outer, self._columns)
        return batch.to(self._accelerator.device)

    def _check_progress(self, recent: _Recent) -> None:
        """Stop a run that cannot come to anything."""
        if not math.isfinite(recent.losses[-1]):
            raise UsageError(f"the loss of step {self.step} is {recent.losses[-1]}",
                             hint=_DIVERGED)
        if self.step == self.plan.warmup + _WINDOW:
            self._first = [recent.figures()["loss"], recent.figures()["accuracy"]]
        if self._first and self.step == self.plan.warmup + _STUCK_AFTER:
            loss, accuracy = recent.figures()["loss"], recent.figures()["accuracy"]
            if loss > 0.995 * self._first[0] and accuracy < self._first[1] + 0.002:
                raise UsageError(f"nothing is learnt: after {self.step} steps the loss is {loss:.3f} (it was "
                                 f"{self._first[0]:.3f}) and the accuracy {accuracy:.1%} (it was {self._first[1]:.1%})",
                                 hint="Try another learning rate (`rate`), a longer warm-up, or other data.")

    # ---- what is left of it ------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self._accelerator.is_main_process)

    def _save(self) -> None:
        if self.leads:
            save_state(self.out / "state", self.step, self.module, self._optimizer, {
                "elapsed_s": self._elapsed, "curve": self.curve, "first": self._first,
                "plan": self._settings()})

    def _summary(self) -> dict[str, Any]:
        tokens = sum(self._lengths)
        return {"plan": self.plan.to_dict(), "steps": self.step, "seconds": round(self._elapsed, 1),
                "text_tokens": tokens, "processes": self._accelerator.num_processes,
                "acceptance": self.evaluate() if self.material.held_out else []}

    def evaluate(self) -> list[dict[str, Any]]:
        """Share of held-out labels that the module has right, by number of stages, filling, and depth of the newest
        token: `top1` and `top4`, counted over all labels, those outside the draft vocabulary included."""
        rows = []
        for ends in self.ends:
            stages = len(ends)
            asked = [(fill, 0) for fill in sorted({1, max(1, stages // 2), stages})]
            asked += [(stages, shift) for shift in sorted({max(1, stages // 4), max(1, stages // 2)}) if shift < stages]
            for fill, shift in asked:
                rows.append({"stages": stages, "fill": fill, "depth": shift} | self._accuracy(ends, fill, shift))
        return rows

    @torch.no_grad()
    def _accuracy(self, ends: Sequence[int], fill: int, shift: int) -> dict[str, float]:
        filling = self._fillings.of(ends, fill, shift)
        right, total = torch.zeros(2), 0
        draft_ids = self.material.draft_ids.to(self._accelerator.device)
        student = self._accelerator.unwrap_model(self._student)
        for indices in epoch_batches(self._lengths[: len(self.material.held_out)], self.plan.batch_tokens, 0, 0):
            with self._autocast():
                hidden, _, best = student.answers(self._batch(indices), filling)
                scores = self.module.logits(hidden)
            total += len(best)
            for place, top in enumerate((1, _TOP)):
                right[place] += int(accepted(scores, best, draft_ids, min(top, scores.shape[-1])).sum())
        top1, top4 = (right / max(1, total)).tolist()
        return {"top1": round(top1, 4), f"top{_TOP}": round(top4, 4)}

    def _write(self, summary: dict[str, Any]) -> None:
        tensors = {name: value.cpu() for name, value in self.module.folded().items()}
        self._outer.to(torch.device("cpu"))
        config = _module_config(self.plan, self.material, self.config.bounds, self.ends, summary)
        features = self._batch([0]).features[0].cpu()
        fixture = make_fixture(config, tensors, self.material.files.config, self._outer, features)
        save_checkpoint(self.out, config, tensors, self.material.draft_ids, fixture)
        (self.out / "curve.json").write_text(json.dumps(self.curve) + "\n")


class _Recent:
    """Figures of the newest steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._counts: list[Tensor] = []
        self._tokens, self._since = 0, time.monotonic()

    def add(self, loss: float, counts: Tensor, tokens: int) -> None:
        self.losses.append(loss)
        self._counts.append(counts)
        del self.losses[:-_WINDOW], self._counts[:-_WINDOW]
        self._tokens += tokens

    def figures(self) -> dict[str, float]:
        """accuracy: of all labels, those outside the draft vocabulary counting as wrong."""
        labels, known, right = (max(1, int(value)) for value in torch.stack(self._counts).sum(0))
        return {"loss": sum(self.losses) / len(self.losses), "accuracy": right / labels, "known": known / labels}

    def line(self) -> str:
        figures, rate = self.figures(), self._tokens / max(1e-9, time.monotonic() - self._since)
        return f"loss {figures['loss']:.3f}, right {figures['accuracy']:.1%}, {rate:.0f} tokens/s"


def _check_material(material: Material) -> None:
    if not any(sample.learn.any() for sample in material.train):
        raise UsageError("every label is masked: there is nothing to learn",
                         hint="Conversations need answers of the assistant; plain text is learnt whole.")
    ids = set(material.draft_ids.tolist())
    if material.eos and not ids & material.eos:
        raise UsageError(f"the draft vocabulary lacks every end-of-text token ({sorted(material.eos)})",
                         hint="Build one with `fullpipe train vocab`, which always has them.")


def _module_config(plan: Plan, material: Material, bounds: tuple[int, ...], ends: tuple[tuple[int, ...], ...],
                   training: dict[str, Any] | None = None) -> ModuleConfig:
    target = material.files.config
    return ModuleConfig(
        kind=plan.kind, hidden=target.hidden, heads=target.heads, kv_heads=target.kv_heads, head_dim=target.head_dim,
        intermediate=target.intermediate, rms_eps=target.rms_eps, num_layers=plan.layers, bounds=bounds,
        verifier_layers=target.num_layers, vocab_size=target.vocab_size, draft_vocab_size=len(material.draft_ids),
        stages=ends, train_span=plan.max_length, verifier=material.identity, qk_norm=target.qk_norm,
        attention_bias=target.qkv_bias, shared_head=plan.shared_head, training=training or {})
