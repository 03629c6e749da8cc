"""The training loop: recordings in, an adapter out, at any moment resumable."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.utils.torch_utils import unwrap_module
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..families import family_of, fresh_adapter
from ..granularity import Adapter, save_adapter
from ..trajectories import sole_transformer
from .checkpoint import load_state, save_atomic
from .config import DistillConfig, differences
from .data import Source
from .objective import Student
from .recordings import open_library
from .samples import Batch, draw

Log = Callable[[str], None]


@dataclass
class Evaluation:
    """Mean squared distance to the base model on held-out trajectories.

    Attributes:
        loss: Of the trained adapter, per multiple.
        untrained: Of the fresh adapter (band-split), per multiple.
        forecast: Of the straight line through the last two full predictions, which takes no model run.
    """

    loss: dict[int, float]
    untrained: dict[int, float]
    forecast: float

    @property
    def gain_db(self) -> dict[int, float]:
        """How much closer than band-split the adapter is, in dB of mean squared distance."""
        return {k: _decibel(self.untrained[k], loss) for k, loss in self.loss.items()}

    @property
    def gain_over_forecast_db(self) -> dict[int, float]:
        """How much closer than the forecast it is. Below 0, its coarse steps are worth less than none."""
        return {k: _decibel(self.forecast, loss) for k, loss in self.loss.items()}


class Trainer:
    """Distills an adapter for a pipeline.

    Args:
        pipe: A plain (not accelerated) pipeline with one transformer; its weights are read, never changed.
        source: What the base model is shown.
        call: Arguments of the pipeline that fix size, steps and guidance; or several such calls of one size, which the
            recordings take in turn. An adapter serves best where it was trained. Pictures are drawn with the first.
        config: Settings.
        out: Directory of the run: checkpoint, adapter, log, and recordings if ``recordings`` is None.
        recordings: Directory of the recordings, to share between runs.
        base_model: Name for the adapter's description.
        tensorboard: Whether to write TensorBoard events (extra ``distill``).
        log: Told of what happens.

    Raises:
        UnsupportedPipelineError, ConfigError: before anything is written.
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
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self._log: Log = log if self.accelerator.is_main_process else lambda _: None
        self.adapter = self._fresh(base_model)
        self.average = copy.deepcopy(self.adapter).requires_grad_(False) if config.ema else self.adapter
        self._untrained = copy.deepcopy(self.adapter).requires_grad_(False)
        self.recorded = open_library(
            recordings or out / "recordings", pipe, self.family, source, self.calls, config.held_out, config.seed
        )
        self.transformer.requires_grad_(False).eval()
        self.step = 0
        self._tensorboard = tensorboard
        self._resumed_seconds = 0.0

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

    def _optimizer(self) -> torch.optim.Optimizer:
        config, parameters = self.config, list(self.adapter.parameters())
        name = config.optimizer
        if name == "auto":
            name = "adamw" if self.family.name == "wan" else "prodigy"
        if name == "adamw":
            lr = 1e-4 if config.lr is None else config.lr
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise ConfigError("the Prodigy optimizer is in the extra: pip install 'ddit-rt[distill]'.") from error
        lr = 1.0 if config.lr is None else config.lr
        return Prodigy(
            parameters, lr=lr, weight_decay=config.weight_decay, use_bias_correction=True, safeguard_warmup=True
        )

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
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number + 1)
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
            resume: Go on from the run's checkpoint, if there is one.
            stop_after: Stop, with a checkpoint, after this step.

        Returns:
            The trained adapter (its average), also at ``out/adapter.safetensors``.

        Raises:
            ConfigError: the directory holds another run, or the loss is not finite.
        """
        config, accelerator = self.config, self.accelerator
        checkpoint = self.out / "checkpoint.pt"
        if checkpoint.exists() and not resume:
            raise ConfigError(f"{self.out} holds a run: pass --resume to go on with it, or choose another directory.")
        optimizer = self._optimizer()
        if checkpoint.exists():
            self._restore(load_state(checkpoint), optimizer)
        student, optimizer = accelerator.prepare(self._student(), optimizer)
        self.average.to(accelerator.device)
        inner: Student = accelerator.unwrap_model(student)
        if config.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        base_rates = [group.get("base_rate", group["lr"]) for group in optimizer.param_groups]
        writer = self._writer()
        if not config.fill:
            self._record_all()
        last = config.steps if stop_after is None else min(stop_after, config.steps)
        bar = tqdm(
            initial=self.step,
            total=config.steps,
            desc="distill",
            disable=not accelerator.is_main_process,
            mininterval=1.0,
        )
        began = time.monotonic()
        recent: list[float] = []
        try:
            while self.step < last:
                for group, rate in zip(optimizer.param_groups, base_rates):
                    group["base_rate"], group["lr"] = rate, rate * config.rate(self.step)
                recent.append(self._one_step(student, inner, optimizer))
                self.step += 1
                bar.update()
                if self.step % 20 == 0 or self.step == last:
                    loss, recent = sum(recent) / len(recent), []
                    bar.set_postfix(loss=f"{loss:.4g}")
                    self._write(writer, {"loss": loss, "rate": optimizer.param_groups[0]["lr"]}, began)
                if self.step % config.checkpoint_every == 0 or self.step == last:
                    self._save(checkpoint, optimizer, began)
                if self.step % config.validate_every == 0 or self.step == config.steps:
                    self._validate(writer, began)
        finally:
            bar.close()
            if config.checkpointing:
                self.transformer.disable_gradient_checkpointing()
            if writer is not None:
                writer.close()
        return self.average

    def _student(self) -> Student:
        return Student(self.adapter, self.family, self.transformer, self.config.weighting == "relative")

    def _one_step(self, student: Any, inner: Student, optimizer: torch.optim.Optimizer) -> float:
        config, accelerator = self.config, self.accelerator
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
        if config.ema:
            weight = 1 - min(config.ema, (1 + self.step) / (10 + self.step))
            averaged = [parameter.data for parameter in self.average.parameters()]
            torch._foreach_lerp_(averaged, [parameter.data for parameter in self.adapter.parameters()], weight)
        return total / config.accumulate

    @torch.no_grad()
    def evaluate(self, batches: int = 4) -> Evaluation:
        """Compares the average with the fresh adapter on held-out trajectories, the same ones every time."""
        losses: dict[str, dict[int, float]] = {"trained": {}, "untrained": {}}
        forecast = 0.0
        dtype = next(self.transformer.parameters()).dtype
        for name, adapter in (("trained", self.average), ("untrained", self._untrained)):
            student = Student(adapter.to(self.accelerator.device), self.family, self.transformer)
            for k in self.config.multiples:
                one = replace(self.config, multiples=(k,), batch=4, blank=0.0)
                total = forecast = 0.0  # the same batches for every k: the forecast does not depend on it
                for index in range(batches):
                    generator = torch.Generator().manual_seed(index)
                    batch = draw(self.recorded, self.recorded.held_out, self.family, adapter.spec.patch, one, generator)
                    forecast += float((batch.forecast() - batch.target.prediction).square().mean()) / batches
                    with student.coarse(k), self.accelerator.autocast():
                        total += float(student(batch.to(self.accelerator.device, dtype)))
                losses[name][k] = total / batches
        return Evaluation(losses["trained"], losses["untrained"], forecast)

    def _validate(self, writer: Any, began: float) -> None:
        if not self.accelerator.is_main_process:
            return
        from .validate import pictures

        result = self.evaluate()
        for k, gain in result.gain_db.items():
            self._log(
                f"step {self.step}: held out, {k}p: {result.loss[k]:.4g}; band-split {result.untrained[k]:.4g} "
                f"({gain:+.1f} dB), forecast {result.forecast:.4g} ({result.gain_over_forecast_db[k]:+.1f} dB)"
            )
        values = {f"held_out/{k}p": value for k, value in result.loss.items()}
        values |= {f"gain_db/{k}p": value for k, value in result.gain_db.items()}
        captions = list(self.source.captions[-self.config.held_out :])
        values |= {f"gain_over_forecast_db/{k}p": value for k, value in result.gain_over_forecast_db.items()}
        sheet = self.out / "pictures" / f"{self.step:07d}.png"
        values |= pictures(self.pipe, self.average, self.calls[0], captions, sheet, self.config.objective)
        self._write(writer, values, began)

    def _record_all(self) -> None:
        own = self.available(self.config.steps)
        for index in tqdm(own, desc="record", disable=not self.accelerator.is_main_process):
            self.recorded.shard(index)

    # -- state --------------------------------------------------------------------------------------------------

    def _save(self, path: Path, optimizer: torch.optim.Optimizer, began: float) -> None:
        if not self.accelerator.is_main_process:
            return
        seconds = self._resumed_seconds + time.monotonic() - began
        summary = {
            **self.config.to_dict(),
            "step": self.step,
            "hours": round(seconds / 3600, 3),
            **self.source.describe(),
            "calls": self.recorded.calls,
        }
        state = {
            "step": self.step,
            "seconds": seconds,
            "config": self.config.to_dict(),
            "adapter": self.adapter.state_dict(),
            "average": self.average.state_dict() if self.config.ema else {},
            "optimizer": optimizer.state_dict(),
        }
        save_atomic(path, state)
        self.average.spec = replace(self.average.spec, training=summary)
        dtype = next(self.transformer.parameters()).dtype
        save_adapter(self.average, self.out / "adapter.safetensors", torch.float16 if dtype == torch.float32 else dtype)

    def _restore(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        # How often it saves and validates may change; everything else would make it another training.
        cadence = {name: getattr(self.config, name) for name in ("checkpoint_every", "validate_every")}
        changed = differences({**state["config"], **cadence}, self.config.to_dict())
        if changed:
            raise ConfigError(f"{self.out} was trained with other settings ({'; '.join(changed)}).")
        self.adapter.load_state_dict(state["adapter"])
        if self.config.ema:
            self.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        self.step, self._resumed_seconds = state["step"], state["seconds"]
        self._log(f"resumed at step {self.step}")

    def _writer(self) -> Any:
        if not self._tensorboard or not self.accelerator.is_main_process:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("TensorBoard is in the extra: pip install 'ddit-rt[distill]', or do without.") from error
        return SummaryWriter(str(self.out / "tensorboard"))

    def _write(self, writer: Any, values: Mapping[str, float], began: float) -> None:
        if not self.accelerator.is_main_process:
            return
        seconds = self._resumed_seconds + time.monotonic() - began
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            rounded = {name: float(f"{value:.5g}") for name, value in values.items()}
            file.write(json.dumps({"step": self.step, "minutes": round(seconds / 60, 2), **rounded}) + "\n")
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name, value, self.step)


def _decibel(reference: float, loss: float) -> float:
    return 10 * math.log10(max(reference, 1e-30) / max(loss, 1e-30))
