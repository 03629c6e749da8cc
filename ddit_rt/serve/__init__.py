"""Serving pictures and videos over HTTP: OpenAI's interface in front of replicas of accelerated pipelines."""

from .bench import Load, run_load
from .bench_report import Percentiles, Summary, summarize, write_load
from .launch import run
from .settings import Limits, ModelConfig, ServeConfig

__all__ = [
    "Limits",
    "Load",
    "ModelConfig",
    "Percentiles",
    "ServeConfig",
    "Summary",
    "run",
    "run_load",
    "summarize",
    "write_load",
]
