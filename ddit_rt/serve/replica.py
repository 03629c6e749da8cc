"""Deployments of Ray Serve: a replica per device, and the ingress in front of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve

from .errors import ApiError
from .gateway import RayGateway
from .metrics import Metrics
from .settings import Limits, ModelConfig, ServeConfig
from .work import Event, ModelFacts, Work


class Replica:
    """One accelerated model on one device. Ray Serve takes it for ready once it is warm.

    Args:
        model: Fields of :class:`ModelConfig`.
        limits: Fields of :class:`Limits`.
    """

    async def __init__(self, model: dict[str, Any], limits: dict[str, Any]) -> None:  # type: ignore[misc]
        _log_through_ray()
        from .loading import load, warm  # torch and diffusers are the replica's alone

        self._engine = await asyncio.to_thread(load, ModelConfig(**model), Limits(**limits).waiting)
        await self._engine.start()
        await warm(self._engine)

    async def facts(self) -> ModelFacts:
        """What is served."""
        return self._engine.variants.facts()

    async def run(self, work: Work) -> AsyncGenerator[Event | ApiError]:
        """Does a work; a refusal is the last thing it yields, since Ray wraps what is raised."""
        try:
            async with aclosing(self._engine.run(work)) as events:
                async for event in events:
                    yield event
        except ApiError as error:
            yield error

    async def check_health(self) -> None:
        """Ray Serve asks every few seconds, and replaces a replica that raises."""
        if self._engine.broken:
            raise RuntimeError(self._engine.broken)


@serve.ingress()
class Ingress:
    """The application in front of the replicas.

    Args:
        config: As of :meth:`ServeConfig.to_dict`.
        handles: Of the models' deployments, in the order of the settings.
    """

    def __init__(self, config: dict[str, Any], *handles: Any) -> None:
        _log_through_ray()
        self._config = ServeConfig(**config)
        self._metrics = Metrics()
        self._handles = {model.name: handle for model, handle in zip(self._config.models, handles)}
        self._application: Any = None

    def __serve_build_asgi_app__(self) -> Any:
        from .app import create_app

        gateway = RayGateway(self._handles, lambda model: self._metrics.retries.labels(model).inc())
        self._application = create_app(self._config, gateway, self._metrics, marks=False)
        return self._application

    async def drain(self) -> None:
        """Takes nothing new, and returns when what has begun is done."""
        await self._application.server.drain()


def _log_through_ray() -> None:
    """Our log goes where Ray Serve's goes, as JSON with the ids of request and replica."""
    ours, rays = logging.getLogger("ddit_rt"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = rays.handlers, False
    ours.setLevel(logging.INFO)


def build(config: ServeConfig, gpus: float) -> Any:
    """The application for ``serve.run``.

    Args:
        config: Of the server.
        gpus: Of a replica whose settings name no number.
    """
    limits = config.to_dict()["limits"]
    replicas = []
    for model, fields in zip(config.models, config.to_dict()["models"]):
        options: dict[str, Any] = {
            "name": model.name,
            "ray_actor_options": {"num_cpus": model.cpus, "num_gpus": gpus if model.gpus is None else model.gpus},
            # the engine's own queue refuses first, and says when there will be room
            "max_ongoing_requests": config.limits.waiting + 2 * model.max_batch + 8,
            "graceful_shutdown_timeout_s": config.drain_seconds,
            "health_check_timeout_s": 60,
            "max_constructor_retry_count": 2,
        }
        if (model.max_replicas or 0) > model.replicas:
            options["autoscaling_config"] = {
                "min_replicas": model.replicas,
                "max_replicas": model.max_replicas,
                "target_ongoing_requests": 2 * model.max_batch,
            }
        else:
            options["num_replicas"] = model.replicas
        replicas.append(serve.deployment(**options)(Replica).bind(fields, limits))
    ingress = serve.deployment(
        name="ingress",
        num_replicas=1,  # keys are counted, and jobs kept, in one place
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )(Ingress)
    return ingress.bind(config.to_dict(), *replicas)
