"""A server from its settings: Ray, Ray Serve, signals."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .settings import ServeConfig

logger = logging.getLogger(__name__)

NAME = "ddit_rt"


def run(config: ServeConfig, address: str | None = None, ready: Callable[[str], Any] = lambda url: None) -> None:
    """Serves until SIGTERM or SIGINT, and then until what has begun is done.

    Args:
        config: Of the server.
        address: Of a Ray cluster; None starts one on this machine for the server's own length.
        ready: Called with the server's URL once every model is warm.

    Raises:
        ConfigError: the cluster has no room for the replicas, the port is taken, the keys cannot be read, or a model
            cannot be loaded.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from .keys import Keys

    _check_port(config)
    if address is None:  # in a cluster the file may lie on another machine
        Keys(config.keys_file)
    stop = threading.Event()
    # without an address Ray would join a cluster that happens to run here
    ray.init(
        address or "local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=True, namespace=NAME
    )
    # after Ray's own, which would end the process at once
    kept = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        found = ray.cluster_resources()
        gpus = 1.0 if found.get("GPU", 0) else 0.0
        _check_room(config, found, gpus)
        logs = LoggingConfig(encoding="JSON", enable_access_log=False)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": config.host, "port": config.port, "request_timeout_s": None},
            logging_config=logs,
        )
        from .replica import build

        try:
            serve.run(build(config, gpus), name=NAME, route_prefix="/", logging_config=logs)
        except RuntimeError as error:
            states = serve.status().applications[NAME].deployments.values()
            told = "\n".join(state.message for state in states) or str(error)
            raise ConfigError(f"a model could not be served: {_reason(told)}") from None
        ready(_url(config))
        while not stop.wait(1.0):  # in turns, for signals are heard in between
            pass
        logger.info("stopping: what has begun is finished")
        ingress = serve.get_app_handle(NAME)
        try:
            ingress.drain.remote().result(timeout_s=config.drain_seconds + 5)
        except Exception:
            logger.exception("the server could not be asked to finish")
    finally:
        serve.shutdown()
        ray.shutdown()
        for number, handler in kept.items():
            signal.signal(number, handler)


def _check_port(config: ServeConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET  # as Ray has it, of names, too
    try:
        *_, address = socket.getaddrinfo(config.host, config.port, family, socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        message = f"port={config.port} at host={config.host!r} cannot be listened at ({error.strerror}): name another."
        raise ConfigError(message) from None


def _url(config: ServeConfig) -> str:
    """Where a client on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _check_room(config: ServeConfig, found: dict[str, float], gpus: float) -> None:
    """Ray would wait for ever for what the cluster does not have."""
    for resource, name in (("CPU", "cpus"), ("GPU", "gpus")):
        wanted = sum(
            model.replicas * (model.cpus if name == "cpus" else gpus if model.gpus is None else model.gpus)
            for model in config.models
        )
        if wanted > found.get(resource, 0) + 1e-9:
            raise ConfigError(
                f"the replicas want {wanted:g} {resource}s and the cluster has {found.get(resource, 0):g}: lower "
                f"replicas, or {name} of a model, which may be a fraction."
            )


def _reason(text: str) -> str:
    """The error in what Ray tells of a replica: its traceback's last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (named or lines)[-1]


def application(arguments: dict[str, str]) -> Any:
    """The application for Ray Serve's own configuration files, as of KubeRay: ``import_path`` names this function.

    Args:
        arguments: "config", a file of :class:`ServeConfig`; its host, port and models' free number of GPUs are the
            cluster's to decide.

    Raises:
        ConfigError: the file cannot be read, or a value is out of range.
    """
    import ray

    from .replica import build

    gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return build(ServeConfig.load(arguments["config"]), gpus)
