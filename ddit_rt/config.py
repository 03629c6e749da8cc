"""The settings of an accelerated pipeline, in Python and as files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo, WithJsonSchema

from .cache_config import CACHE_SCHEMA, TeaCacheConfig, checked_cache
from .errors import ConfigError, DDiTError, ScheduleError
from .multiples import SKIP, TEMPORAL_MULTIPLES, volume
from .schedule_config import SCHEDULE_SCHEMA, ScheduleFn, checked_multiples, checked_schedule, no_multiple
from .settings import JSON_ENDING, YAML_ENDINGS, Expected, Settings, read_json, read_yaml, shown

DEFAULT_SPEEDUP = 2.0
"""What ``accelerate(pipe)`` aims at."""
# settings that leave the choice of steps to the default target
_NEUTRAL = frozenset(
    {
        *("reference", "toward_converged", "costs", "fit", "corrector", "backend", "fused_full", "cuda_graphs"),
        *("max_graphs", "modulation", "trim_text", "batch_guidance", "attention"),
    }
)


def _coarse_names() -> tuple[str, ...]:
    # asked when a setting is checked, not imported: the registry stands above the settings
    return ("auto", *importlib.import_module("ddit_rt.granularity").path_names())


def _checked_coarse(name: Any) -> str:
    if name == "auto":  # without loading what the registry stands on
        return "auto"
    names = _coarse_names()
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"coarse={shown(name)}: use one of {', '.join(map(repr, names))}.")
    return name


def _checked_initial(steps: float) -> float:
    if steps > 1 and steps != int(steps):
        raise ValueError("a part of a step")
    return steps


def _cache_beside(cache: Any, info: ValidationInfo) -> Any:
    return checked_cache(cache, one_size=info.data.get("multiples") == (1,))


class DDiTConfig(Settings):
    """How an accelerated pipeline chooses and runs its patch sizes.

    A YAML or JSON file with the same names holds the same settings: :meth:`load`, :meth:`save`, and
    ``accelerate(pipe, config="ddit.yaml")``. :meth:`model_json_schema` describes such files to editors.

    Raises:
        ConfigError: a value is out of range.
        ScheduleError: ``schedule`` is neither a callable, nor a file, nor a sequence of the multiples above.
    """

    multiples: Annotated[tuple[int, ...], BeforeValidator(checked_multiples)] = (1, 2, 4)
    """Patch sizes the policy may choose, as multiples of the model's own patch ``p``; holds 1. Left out, those of them
    that the model can work with. For video also pairs (latent frames, side): ``(2, 1)`` and ``(2, 2)``, which schedules
    and reports write 21 and 22."""
    threshold: Annotated[float, Field(ge=0), Expected("τ is a number >= 0 (0 keeps every step full).")] = 1e-3
    """τ of the paper's equation 5, in latent units. A size is smooth enough when the ρ-quantile of its per-patch
    standard deviations lies below τ. 0 keeps every step at the finest size. The paper's 1e-3 is for FLUX and Wan
    latents at 50 steps; ``ddit-rt calibrate`` finds the value for another model or step count."""
    quantile: Annotated[float, Field(ge=0, le=1), Expected("ρ is a share of the patches, a number in [0, 1].")] = 0.4
    """ρ in [0, 1], the share of patches that have to be smooth."""
    order: Annotated[int, Field(ge=1, le=3), Expected("the finite difference has order 1, 2 or 3.")] = 3
    """n of the n-th finite difference of the latent, 1 to 3. The first ``order`` steps run at multiple 1."""
    schedule: Annotated[
        Sequence[int] | ScheduleFn | None, PlainValidator(checked_schedule), WithJsonSchema(SCHEDULE_SCHEMA)
    ] = None
    """Overrides the policy: a sequence of multiples, one per denoising step, a callable ``(step index, {multiple:
    sigma_k}) -> multiple``, a :class:`ddit_rt.FittedSchedule`, or the path of a ``.json`` file of ``ddit-rt fit`` that
    holds one, which is read at once. A 0 makes no model call: its prediction lies on the straight line through the last
    two that the model made. In a settings file, a relative path starts at that file's folder."""
    coarse: Annotated[
        str,
        PlainValidator(_checked_coarse),
        WithJsonSchema({"type": "string"}),
        Field(json_schema_extra=lambda schema: schema.update(enum=list(_coarse_names()))),
    ] = "auto"
    """What a coarse step computes. ``"delta"``: band-split, the coarse model supplying only the change since the last
    full step; ``"band-split"``: without that anchor; ``"naive"``: PI-resized embeddings and nothing else;
    ``"adapter"``: the trained adapter; ``"adapter-delta"``: the trained adapter, supplying only the change;
    ``"extrapolate"`` and ``"reuse"``: the baselines that make no model call; or a path of your own that
    :func:`ddit_rt.granularity.register_path` knows. ``"auto"``: adapter if one is given, else delta."""
    residual: Literal["constant", "linear"] = "linear"
    """With the two deltas: ``"constant"`` keeps the residual of the last full step, ``"linear"`` extrapolates it from
    the last two."""
    high_band: Literal["line", "clean"] = "line"
    """With ``"delta"``, what coarse tokens cannot see: ``"line"`` follows the straight line through the last two full
    predictions, ``"clean"`` is the noise left over the clean latent of the last one."""
    positions: Literal["auto", "native", "interpolated"] = "auto"
    """Coordinates of coarse tokens: ``"native"`` (as in a picture k times smaller) or ``"interpolated"`` (centres of
    the coarse patches on the full grid). ``"auto"``: interpolated for naive, an adapter as it was trained, else
    native."""
    max_consecutive_coarse: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"] | None,
        Expected("a whole number >= 1, None for no limit, or 'auto'."),
    ] = "auto"
    """Longest run of coarse steps the policy may make before a full step refreshes it; None: no limit. ``"auto"``: 2
    where coarse steps lean on the last full one without training (delta, extrapolate, reuse), the longest it was
    trained for with an adapter that has a memory, else no limit. Explicit schedules are taken as they are."""
    initial_full_steps: Annotated[
        float,
        Field(ge=0),
        AfterValidator(_checked_initial),
        Expected("a share of the steps below 1, or their whole number."),
    ] = 0.125
    """First steps that the policy leaves full, at least the ``order`` steps that fill its history: a share of the run's
    steps if below 1, else their number. Early predictions change most while the latent, in small steps, shows little
    of it."""
    skip_below: Annotated[float, Field(ge=0), Expected("a number >= 0 (0 makes no skipped steps).")] = 0.0
    """The policy makes a step without a model call when σ_k of every size lies below this share of τ; 0: never."""
    max_consecutive_skipped: Annotated[int, Field(ge=1), Expected("a whole number >= 1.")] = 2
    """Longest run of such steps."""
    speedup: Annotated[float | None, Field(gt=1), Expected("the wanted ratio of FLOP, a number above 1, or None.")] = (
        None
    )
    """Wanted ratio of the transformer's FLOP, plain over accelerated: full steps are placed where errors count most and
    the steps between them are skipped. It takes what was fitted to this model and call if there is such a schedule
    (:func:`ddit_rt.fit`), else a rule that needs no measurement. Not together with ``schedule``. Left out it is 2,
    unless ``schedule``, ``quality`` or a setting of the threshold rule is given."""
    quality: Annotated[float | None, Field(gt=0), Expected("the wanted PSNR in dB, a number above 0, or None.")] = None
    """Wanted mean PSNR to the ``reference`` in dB, instead of a speed-up: the fastest schedule that was fitted to this
    model and call and reached it, else as many evaluations as reach it on the demo model. Prompts differ: a mean of 40
    dB has single pictures from 33 to 46."""
    reference: Literal["plain", "converged"] = "plain"
    """What a run aims at: ``"plain"``, the picture that the pipeline's own steps would give, or ``"converged"``, the
    one that infinitely many steps would give from the same noise. For the second the latent is integrated by a solver
    of second order, and ``speedup`` places its evaluations at noise levels of its own."""
    toward_converged: Annotated[float, Field(ge=0, le=1), Expected("a share of the way, a number from 0 to 1.")] = 0.0
    """With ``reference="plain"`` and Euler's steps, the share of the way from the plain picture to the converged one at
    which a run aims. But for its own error, 0.3 ends 3 dB nearer to the converged picture than the plain pipeline, and
    10 dB nearer to the plain picture than that. Steps and noise levels are those of 0; full steps are then no longer
    the scheduler's own bit for bit."""
    costs: Literal["flops", "seconds"] = "flops"
    """What ``speedup`` is a ratio of in fitted schedules: ``"flops"``, the same on every machine, or ``"seconds"`` of
    the steps, as a fit timed them on this one: small matrices keep coarse steps from being as fast as their FLOP say,
    and skipped ones are not free. Schedules of the two kinds are kept apart. Where none is kept, the rule counts
    evaluations in either case."""
    fit: Annotated[Literal["first-calls"] | None, Expected("use 'first-calls' or None.")] = None
    """Where no fitted schedule is kept for a call with a target: ``"first-calls"`` counts such calls, which run as they
    would without it, and the last of :data:`ddit_rt.fitting.FIRST_CALLS` fits a schedule to what they asked for before
    it returns, about eight plain runs for each of them. Later calls, of other processes too, run that schedule. None
    leaves fitting to :func:`ddit_rt.fit`."""
    corrector: Annotated[bool, Expected("use True or False.")] = True
    """When a full step follows skipped ones, integrate the gap again with the prediction that is now known, and move
    the latent by the difference. It calls no model; without a skipped step nothing changes."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Kernels: ``"triton"``, ``"torch"``, or ``"auto"``, which is Triton on CUDA devices and PyTorch elsewhere. Where
    Triton runs, they measure the latent's evolution and stand in for the transformer's ends in coarse steps, with all
    that the coarse path does around the model; what they cannot serve runs in PyTorch, and the log says why."""
    fused_full: Annotated[bool, Expected("use True or False.")] = False
    """The kernels stand in for the transformer's ends in full steps, too. Their rounding differs from that of its own
    layers: full steps equal the plain pipeline's within the dtype's tolerance, and no longer bit for bit."""
    cuda_graphs: Annotated[bool | Literal["auto"], Expected("use 'auto', True or False.")] = "auto"
    """Run every size from a captured CUDA graph: ``"auto"`` on CUDA devices, True also insists on one, False never.
    What cannot be captured runs eagerly, and the log says why."""
    max_graphs: Annotated[int, Field(ge=1), Expected("a whole number >= 1.")] = 24
    """Most graphs to keep, one per size and signature of the inputs; the least recently used goes first."""
    merge_adapter: Annotated[bool, Expected("use True or False.")] = False
    """Merge the adapter's LoRA into copies of the layers' weights, one per coarse size: nothing to compute beside the
    model, for memory (FLUX.1-dev, bf16: 12 GB per size). Layers that are quantised, hooked or have a user's LoRA keep
    ours beside them."""
    modulation: Literal["step", "ahead"] = "step"
    """When the transformer makes its modulations, adaLN's scales and shifts, from the noise level: ``"step"``, in every
    step, reading their weights each time (FLUX.1-dev: 6.5 GB), or ``"ahead"``, those of all steps of a call in one
    product per layer, at the first. The sums are the same in another order, so that pictures agree to the rounding of
    the weights' dtype and not bit for bit. FLUX."""
    trim_text: Annotated[bool, Expected("use True or False.")] = False
    """Leave the padding behind the prompt out of coarse steps, rounded up to a sixteenth of the text's length. A model
    that attends to padding, as FLUX does, predicts something else without it. FLUX, in calls with a ``prompt``."""
    batch_guidance: Literal["never", "coarse", "always"] = "never"
    """Which steps run the two calls of guidance, prompt and negative prompt, as one call of twice the batch:
    ``"coarse"``, coarse steps, or ``"always"``, full steps too. The predictions are the same but for rounding, so that
    full steps are no longer the plain pipeline's bit for bit. What the second call will be given is taken from the last
    step; where it turns out to be something else, that call runs by itself. Where it cannot be, the report says why."""
    attention: Annotated[str | None, Expected("'auto', the name of an attention back-end of diffusers, or None.")] = (
        None
    )
    """What computes the transformer's attention: None leaves it as it is; ``"auto"`` takes the fastest of diffusers'
    back-ends for the card that computes in the model's precision, FlashAttention-3 or cuDNN on Hopper and PyTorch's own
    elsewhere; or a name of diffusers', such as ``"sage"``, which multiplies in 8 bits. Full steps then equal the plain
    pipeline's but for rounding. ``restore`` takes it back, and the report names it."""
    cache: Annotated[Any, PlainValidator(_cache_beside), WithJsonSchema(CACHE_SCHEMA)] = None
    """A step cache to combine with: ``"teacache"``, a :class:`TeaCacheConfig` or a mapping ``{"type": "teacache",
    "threshold": 0.4}``, or a cache config of diffusers (``FirstBlockCacheConfig``, ``TaylorSeerCacheConfig``,
    ``MagCacheConfig``), which keeps a state per patch size; diffusers' other caches need ``multiples=(1,)``. The report
    counts what TeaCache skips, not what diffusers' caches skip inside the transformer. None for none."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        targets = [name for name in ("speedup", "quality", "schedule") if getattr(self, name) is not None]
        if len(targets) > 1:
            pairs = " and ".join(f"{name}={shown(getattr(self, name))}" for name in targets)
            raise ConfigError(f"{pairs}: a target or a schedule decides alone; give one of them.")
        self._take_in_spanning()
        if not set(values) - _NEUTRAL:
            # not through the frozen setter; it stays out of the fields that were set
            self.__dict__["speedup"] = DEFAULT_SPEEDUP
        self._check_aim()
        if self.fit is not None and not self.has_target:
            raise ConfigError(f"fit={self.fit!r}: a schedule is fitted to a target; give speedup= or quality= too.")

    def _check_aim(self) -> None:
        """Refuses a share of the way to the converged picture beside what leaves none, or cannot go it."""
        if not self.toward_converged:
            return
        reason = ""
        if self.aims_at_converged:
            reason = "reference='converged' aims at the converged picture itself"
        elif self.quality is not None:
            reason = f"quality={self.quality:g} is told by the distance to plain of runs that aim there; give speedup="
        elif not self.corrector:
            reason = "it is part of what corrector=False turns off"
        if reason:
            raise ConfigError(f"toward_converged={self.toward_converged:g}: {reason}. Leave out one of them.")

    def _take_in_spanning(self) -> None:
        """Adds the sizes of the schedule that span frames, which are none of the multiples unless they are given."""
        listed = getattr(self.schedule, "schedule", self.schedule)  # of a fitted one
        for index, multiple in enumerate(listed if isinstance(listed, Sequence) else ()):
            if multiple not in TEMPORAL_MULTIPLES or multiple in self.multiples:
                continue
            if "multiples" in self.model_fields_set:
                raise no_multiple(index, multiple, self.multiples)
            self.__dict__["multiples"] = tuple(sorted((*self.multiples, multiple), key=volume))

    def replace(self, **changes: Any) -> DDiTConfig:
        """As :meth:`Settings.replace`; the default target stays where no change takes the choice of steps from it."""
        if self.speedup is None or self.chosen_target or set(changes) - _NEUTRAL:
            return super().replace(**changes)
        kept = super().replace(speedup=self.speedup, **changes)
        kept.model_fields_set.remove("speedup")  # still nobody's choice
        return kept

    @property
    def aims_at_converged(self) -> bool:
        """Whether runs aim at the converged picture: by ``reference``, or by what the schedule was fitted to."""
        return "converged" in (self.reference, getattr(self.schedule, "reference", ""))

    @property
    def aim(self) -> float:
        """How far from the plain picture, 0, to the converged one, 1, runs aim."""
        return 1.0 if self.aims_at_converged else self.toward_converged

    @property
    def has_target(self) -> bool:
        """Whether a speed-up or a quality decides."""
        return self.speedup is not None or self.quality is not None

    @property
    def chosen_target(self) -> bool:
        """Whether a target was asked for, and is not the default."""
        return self.quality is not None or (self.speedup is not None and "speedup" in self.model_fields_set)

    @property
    def approximates(self) -> bool:
        """Whether any step of a run may be other than full."""
        by_threshold = (len(self.multiples) > 1 and self.threshold > 0) or self.skip_below > 0
        return self.schedule is not None or self.has_target or by_threshold

    @property
    def may_be_coarse(self) -> bool:
        """Whether any step of a run may have another number of tokens."""
        by_rule = not self.has_target and self.threshold > 0
        return len(self.multiples) > 1 and (self.schedule is not None or by_rule)

    def limited_to(self, multiples: tuple[int, ...], model: str) -> DDiTConfig:
        """These settings for a model that can work with some sizes only: where ``multiples`` was left out it is cut.

        Args:
            multiples: That it can work with.
            model: What to call it in messages.

        Raises:
            ConfigError: ``multiples`` was given, and holds others.
            ScheduleError: the schedule does.
        """
        if set(self.multiples) <= set(multiples):
            return self
        kept = tuple(k for k in self.multiples if k in multiples)
        if "multiples" in self.model_fields_set:
            raise ConfigError(
                f"multiples={self.multiples}: {model} can work with {multiples} only; pass multiples={kept}, or leave "
                "it out."
            )
        listed = getattr(self.schedule, "schedule", self.schedule)  # of a fitted one
        for index, multiple in enumerate(listed if isinstance(listed, Sequence) else ()):
            if multiple not in (SKIP, *kept):
                raise ScheduleError(
                    f"schedule[{index}]={multiple}: {model} can work with multiples {kept} only, or {SKIP} for no "
                    "model call."
                )
        return self.model_copy(update={"multiples": kept})

    @classmethod
    def make(
        cls, config: DDiTConfig | Mapping[str, Any] | str | Path | None, overrides: Mapping[str, Any]
    ) -> DDiTConfig:
        """Joins a config (object, mapping, path of a file, or None for the defaults) with keyword overrides.

        Raises:
            ConfigError: an unknown name, a value out of range, or a file that :meth:`load` refuses.
        """
        if isinstance(config, str | Path):
            config = cls.load(config)
        if config is not None and not isinstance(config, Mapping | cls):
            raise ConfigError(
                f"config={shown(config)}: pass a DDiTConfig, a mapping of its fields, the path of a file, or None."
            )
        cls.check_names(config if isinstance(config, Mapping) else {}, overrides)
        base = config if isinstance(config, cls) else cls(**dict(config or {}))
        return base.replace(**overrides) if overrides else base

    @classmethod
    def load(cls, path: str | Path) -> DDiTConfig:
        """Reads a YAML (``.yaml``, ``.yml``) or JSON (``.json``) file: a mapping of the fields' names to their values.

        Raises:
            ConfigError: there is no such file, it is too large or of another kind, a name is unknown or a value out of
                range; the message names file and setting.
            ScheduleError: the same of the schedule's entries.
        """
        path = Path(path)
        if path.suffix == JSON_ENDING:
            values = read_json(path, "config")
        elif path.suffix in YAML_ENDINGS:
            values = read_yaml(path, "config")
        else:
            raise ConfigError(f"config={str(path)!r}: settings are read from .yaml, .yml and .json files.")
        if not isinstance(values, dict):
            raise ConfigError(
                f"config={str(path)!r} holds {shown(values)}: write a mapping of settings, as in `threshold: 0.001`."
            )
        schedule = values.get("schedule")
        if isinstance(schedule, str) and schedule.endswith(JSON_ENDING):
            values["schedule"] = path.parent / schedule
        try:
            return cls.make(values, {})
        except DDiTError as error:
            raise type(error)(f"{path}: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Writes the fields that were given as YAML (``.yaml``, ``.yml``) or JSON (``.json``), for :meth:`load`.

        The others stay out: some defaults, such as the target, hold only where nobody chose.

        Returns:
            The file's path.

        Raises:
            ConfigError: another ending, a callable schedule, or a cache of diffusers', which no file can hold.
        """
        path = Path(path)
        if path.suffix not in (*YAML_ENDINGS, JSON_ENDING):
            raise ConfigError(f"path={str(path)!r}: settings are written to .yaml, .yml and .json files.")
        values = {name: value for name, value in self if name in self.model_fields_set}
        for name in ("schedule", "cache"):
            value = values.get(name)
            if not (value is None or isinstance(value, tuple | TeaCacheConfig)):
                raise ConfigError(
                    f"{name}={shown(value)} cannot be saved: save config.replace({name}=None), and pass "
                    f"{name}=... beside the file, as in accelerate(pipe, {path.name!r}, {name}=...)."
                )
        if isinstance(self.cache, TeaCacheConfig):
            values["cache"] = {"type": "teacache", **dict(self.cache)}
        if path.suffix == JSON_ENDING:
            text = json.dumps(values, indent=2) + "\n"
        else:
            text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a callable schedule is given by its name."""
        values = dict(self)
        if self.cache is not None:
            values["cache"] = repr(self.cache)
        fitted = getattr(self.schedule, "schedule", None)
        if isinstance(fitted, list):
            values["schedule"] = tuple(fitted)
        elif self.schedule is not None and not isinstance(self.schedule, tuple):
            values["schedule"] = getattr(self.schedule, "__qualname__", repr(self.schedule))
        return values
