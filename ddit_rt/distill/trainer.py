"""The training loop: recordings in, an adapter out, at any moment resumable."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration
from diffusers.utils.torch_utils import unwrap_module
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..families import family_of, fresh_adapter
from ..granularity import Adapter, save_adapter
from ..trajectories import sole_transformer
from .checkpoint import Checkpoints
from .config import DistillConfig
from .data import Source, mixed_seed
from .objective import Student
from .optimization import build_optimizer, build_schedule, moving_average
from .recordings import open_library
from .samples import Batch, draw
from .tracking import build_trackers, last_entry
from .validation import Evaluation, evaluate, pictures

Log = Callable[[str], None]


class Trainer:
    """Distills an adapter for a pipeline.

    Args:
        pipe: A plain (not accelerated) pipeline with one transformer; its weights are read, never changed.
        source: What the base model is shown.
        call: Arguments of the pipeline that fix size, steps and guidance; or several such calls of one size, which the
            recordings take in turn. An adapter serves best where it was trained. Pictures are drawn with the first.
        config: Settings.
        out: Directory of the run: checkpoints, adapter, log, and recordings if ``recordings`` is None.
        recordings: Directory of the recordings, to share between runs.
        base_model: Name for the adapter's description.
        tensorboard: Whether to write TensorBoard events (extra ``distill``).
        log: Told of what happens.

    Attributes:
        adapter: What is trained.
        step: Optimizer steps done.

    Raises:
        UnsupportedPipelineError, ConfigError: before anything is written; also for recordings of another model,
            scheduler, call or data.
    """

    def __init__(
        self,
        pipe: Any,
        source: Source,
        call: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        config: DistillConfig,
        out: Path,
        *,
        recordings: Path | None = None,
        base_model: str = "",
        tensorboard: bool = False,
        log: Log = print,
    ) -> None:
        self.pipe, self.source, self.config, self.out = pipe, source, config, out
        self.calls = [dict(one) for one in ([call] if isinstance(call, Mapping) else call)]
        self.family = family_of(pipe)
        self.transformer = unwrap_module(sole_transformer(pipe, self.family))
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=next(self.transformer.parameters()).device.type == "cpu",
            log_with=build_trackers(out, tensorboard),
            project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
            step_scheduler_with_optimizer=False,  # or the rate would take a step per process
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self._log: Log = log if self.accelerator.is_main_process else lambda _: None
        self.adapter = self._fresh(base_model)
        self._averaged = moving_average(self.adapter, config.ema)
        self._untrained = copy.deepcopy(self.adapter).requires_grad_(False)
        self.recorded = open_library(
            recordings or out / "recordings", pipe, self.family, source, self.calls, config.held_out, config.seed
        )
        self.transformer.requires_grad_(False).eval()
        self.checkpoints = Checkpoints(out / "checkpoints", self.accelerator, self.recorded.manifest)
        self.step = 0
        self._began = 0.0  # on the monotonic clock, as if the run had never been interrupted

    # -- parts --------------------------------------------------------------------------------------------------

    def _fresh(self, base_model: str) -> Adapter:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return fresh_adapter(
                self.family,
                self.transformer,
                multiples=config.multiples,
                targets=config.targets,
                rank=config.rank,
                alpha=config.alpha,
                shared=config.shared,
                memory=config.memory,
                positions=config.positions,
                base_model=base_model,
            )

    @property
    def average(self) -> Adapter:
        """The moving average of the adapter's weights: what is validated and saved."""
        return self._averaged.module

    def available(self, step: int) -> Sequence[int]:
        """Training shards of this process at ``step``: their number grows while recording is spread over the run."""
        training = self.recorded.training
        own = training[self.accelerator.process_index :: self.accelerator.num_processes] or training
        filled = self.config.fill * self.config.steps
        share = 1.0 if step >= filled else (step + 1) / filled
        return own[: max(1, math.ceil(share * len(own)))]

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of a micro-step, the same whether the run was interrupted before it or not."""
        number = (
            step * self.config.accumulate + micro
        ) * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(mixed_seed(self.config.seed, number + 1))
        patch = self.adapter.spec.patch
        drawn = draw(self.recorded, self.available(step), self.family, patch, self.config, generator)
        return drawn.to(self.accelerator.device, next(self.transformer.parameters()).dtype)

    def timed(self, batch: Batch) -> float:
        """Seconds of a forward and backward pass; changes nothing."""
        student = self._student()
        began = time.perf_counter()
        with student.coarse(batch.multiple), self.accelerator.autocast():
            loss = student(batch)
            loss.backward()
        float(loss.detach())  # waits for the device
        self.adapter.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    # -- running ------------------------------------------------------------------------------------------------

    def train(self, resume: bool = False, stop_after: int | None = None) -> Adapter:
        """Trains to the last step, or to ``stop_after``.

        Args:
            resume: Go on from the run's newest checkpoint, if there is one. The adapter's file and the validation of
                its step are made up for where the run was killed before them.
            stop_after: Stop, with a checkpoint, after this step.

        Returns:
            The trained adapter (its average), also at ``out/adapter.safetensors``.

        Raises:
            ConfigError: the directory holds another run, such as one of another model or scheduler, or a damaged
                checkpoint, or the loss is not finite.
        """
        kept = bool(self.checkpoints.folders())
        if kept and not resume:
            raise ConfigError(f"{self.out} holds a run: pass --resume to go on with it, or choose another directory.")
        if self.step and not kept:
            raise ConfigError(f"step={self.step}: this run stopped before its first checkpoint. Make a new Trainer.")
        try:
            self._run(self.config.steps if stop_after is None else min(stop_after, self.config.steps))
            self.accelerator.wait_for_everyone()
        finally:
            if self.config.checkpointing:
                self.transformer.disable_gradient_checkpointing()
            self.accelerator.end_training()
            self.accelerator.free_memory()  # forgets what it prepared
        return self.average

    def _run(self, last: int) -> None:
        config, accelerator = self.config, self.accelerator
        optimizer = build_optimizer(config, self.family, self.adapter.parameters())
        student, optimizer, schedule = accelerator.prepare(
            self._student(), optimizer, build_schedule(config, optimizer)
        )
        accelerator.prepare_model(self._averaged, evaluation_mode=True)  # so that it is in the checkpoints
        optimizer.zero_grad(set_to_none=True)  # of a step that was interrupted
        self._began = time.monotonic()
        resumed = bool(self.checkpoints.folders())
        if resumed:
            self.step, seconds = self.checkpoints.restore(config)
            self._began -= seconds
            self._log(f"resumed at step {self.step}")
        if not accelerator.trackers:
            accelerator.init_trackers("distill")
        if config.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if not config.fill:
            self._record_all()
        if resumed:
            self._make_up()
        recent: list[float] = []
        hidden = not accelerator.is_main_process
        with tqdm(initial=self.step, total=config.steps, desc="distill", disable=hidden, mininterval=1.0) as bar:
            while self.step < last:
                rate = schedule.get_last_lr()[0]
                recent.append(self._one_step(student, optimizer))
                schedule.step()
                self.step += 1
                bar.update()
                if self.step % 20 == 0 or self.step == last:
                    loss, recent = sum(recent) / len(recent), []
                    bar.set_postfix(loss=f"{loss:.4g}")
                    self._write({"loss": loss, "lr": rate})
                if self.step % config.checkpoint_every == 0 or self.step == last:
                    self._save()
                if self._validates():
                    self._validate()

    def _make_up(self) -> None:
        """Does what follows a checkpoint: the run may have been killed before it was done, or half done."""
        self._write_adapter()
        entry = last_entry(self.out / "log.jsonl", self.step)
        if self._validates() and not any(name.startswith("held_out/") for name in entry):
            self._validate()

    def _validates(self) -> bool:
        return self.step % self.config.validate_every == 0 or self.step == self.config.steps

    def _student(self) -> Student:
        return Student(self.adapter, self.family, self.transformer, self.config.weighting == "relative")

    def _one_step(self, student: Any, optimizer: torch.optim.Optimizer) -> float:
        config, accelerator = self.config, self.accelerator
        inner: Student = accelerator.unwrap_model(student)
        total = 0.0
        for micro in range(config.accumulate):
            batch = self.batch(self.step, micro)
            waits = accelerator.no_sync(student) if micro + 1 < config.accumulate else nullcontext()
            with waits, inner.coarse(batch.multiple):
                loss = student(batch)
                accelerator.backward(loss / config.accumulate)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ConfigError(
                f"the loss is not finite at step {self.step}: lower the learning rate, or check the recordings. The "
                f"last checkpoint in {self.out} is sound."
            )
        if config.clip:
            accelerator.clip_grad_norm_(self.adapter.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._averaged.update_parameters(self.adapter)
        return total / config.accumulate

    def evaluate(self, batches: int = 4) -> Evaluation:
        """Compares the average with the fresh adapter and the forecast on held-out trajectories.

        Args:
            batches: Of four samples, per multiple; the same ones every time.
        """
        return evaluate(
            self.average,
            self._untrained,
            self.recorded,
            self.family,
            self.transformer,
            self.config,
            self.accelerator,
            batches,
        )

    def _validate(self) -> None:
        if not self.accelerator.is_main_process:
            return
        found = self.evaluate()
        for line in found.lines():
            self._log(f"step {self.step}: {line}")
        captions = list(self.source.captions[-self.config.held_out :])
        sheet = self.out / "pictures" / f"{self.step:07d}.png"
        shown = pictures(self.pipe, self.average, self.calls[0], captions, sheet, self.config.objective)
        self._write({**found.values(), **shown})

    def _record_all(self) -> None:
        own = self.available(self.config.steps)
        for index in tqdm(own, desc="record", disable=not self.accelerator.is_main_process):
            self.recorded.shard(index)

    # -- state --------------------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        """Spent on the run, without its interruptions."""
        return time.monotonic() - self._began

    def _save(self) -> None:
        self.checkpoints.save(self.step, self._seconds(), self.config)
        self._write_adapter()

    def _write_adapter(self) -> None:
        if not self.accelerator.is_main_process:
            return
        summary = {
            **self.config.to_dict(),
            "step": self.step,
            "hours": round(self._seconds() / 3600, 3),
            **self.source.describe(),
            "calls": self.recorded.calls,
        }
        self.average.spec = replace(self.average.spec, training=summary)
        dtype = next(self.transformer.parameters()).dtype
        save_adapter(self.average, self.out / "adapter.safetensors", torch.float16 if dtype == torch.float32 else dtype)

    def _write(self, values: Mapping[str, float]) -> None:
        self.accelerator.log({"minutes": round(self._seconds() / 60, 2), **values}, step=self.step)
