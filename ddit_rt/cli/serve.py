"""``ddit-rt serve``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import Adapter, Device, Dtype, OptionalModel, Quantize
from .terminal import activity, note, print_line


def command(
    model: OptionalModel = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file of models, limits and keys, instead of a model.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Target of requests that name none; 1 is plain.")] = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model, a GPU each.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Pictures that run together.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at.")] = None,
    folder: Annotated[Path | None, typer.Option(help="For videos and pictures that are asked for by URL.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="API keys, a line NAME SHA256 each.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    cluster: Annotated[str | None, typer.Option(help="Address of a Ray cluster; by default this machine.")] = None,
) -> None:
    """Serves pictures and videos with OpenAI's interface, and a page to try it at /.

    MODEL is 'demo' without one; --config names several. Stops on Ctrl-C or SIGTERM, after what has begun.
    """
    missing = [package for package in ("ray", "fastapi", "prometheus_client", "limits") if not _there(package)]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'ddit-rt[serve]'.")
    from ..serve import ModelConfig, ServeConfig, run

    one = {
        "speedup": speedup,
        "adapter": adapter,
        "quantize": quantize,
        "replicas": replicas,
        "max_batch": max_batch,
        "dtype": dtype,
        "device": device,
    }
    given: dict[str, Any] = {key: value for key, value in one.items() if value is not None}
    own = {"host": host, "port": port, "folder": folder, "keys_file": keys_file}
    shared: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in own.items() if v is not None}
    if config is not None:
        if model is not None or name is not None or given:
            raise ConfigError("--config names the models and their settings: leave MODEL and its options out.")
        settings = ServeConfig.load(config).replace(**shared)
    else:
        source = model or "demo"
        named = name or source.rstrip("/").rpartition("/")[2]
        settings = ServeConfig(models=(ModelConfig(name=named, model=source, **given),), **shared)
    with activity("starting") as show:

        def ready(url: str) -> None:
            show("")
            names = ", ".join(each.name for each in settings.models)
            print_line(f"ready: {names} at {url}")
            if settings.playground:
                note(f"a page to try it: {url}/")

        show(f"loading {', '.join(each.model for each in settings.models)}")
        run(settings, cluster, ready)


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
