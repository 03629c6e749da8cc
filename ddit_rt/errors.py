"""Errors of ddit_rt. Every one names the offending value and the way out."""


class DDiTError(Exception):
    """Base class of every error that ddit_rt raises on purpose."""


class ConfigError(DDiTError, ValueError):
    """A setting of :class:`ddit_rt.DDiTConfig` (or an input tensor) is out of range."""


class OutOfReachError(ConfigError):
    """A wanted speed-up that the other settings do not allow."""


class UnsupportedPipelineError(DDiTError, TypeError):
    """The pipeline, its transformer or its scheduler is none that ddit_rt knows how to run coarsely."""


class AdapterMismatchError(DDiTError, ValueError):
    """An adapter does not fit the model it is applied to."""


class ScheduleError(DDiTError, ValueError):
    """A schedule does not fit the run: wrong length, an unknown multiple, or a step that cannot be coarse."""
