"""What an accelerated pipeline puts on its components and takes off: patched methods, caches, an attention back-end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config import DDiTConfig
from ..families import Family
from ..runtime import Attention, AttentionSwitch, MethodPatch
from ..schedule import check_process
from .caches import StepCaches
from .checks import check_not_compiled, check_parallel, check_unshared
from .plain_state import keep_plain, release_plain

Handler = Callable[..., Any]


class Attachment:
    """The patches of one pipeline instance; its classes and every other instance are left alone.

    Args:
        owner: The accelerated pipeline that the components are marked as belonging to.
        pipe: A diffusers pipeline.
        family: What is known of its transformer.
        modules: Component name -> transformer.
        caches: What is enabled on the transformers along with the patches.
        attention: Attention back-end to switch to; None leaves the model's own.
        forward: Makes the handler of a transformer's ``forward``.
        scheduler: Method of the scheduler -> its handler.
        pipeline: Method of the pipeline -> its handler; methods that it lacks are passed over.

    Attributes:
        scheduler: The scheduler that is patched; None while nothing is.
    """

    def __init__(
        self,
        owner: Any,
        pipe: Any,
        family: Family,
        modules: Mapping[str, nn.Module],
        caches: StepCaches,
        attention: Attention | None,
        *,
        forward: Callable[[nn.Module], Handler],
        scheduler: Mapping[str, Handler],
        pipeline: Mapping[str, Handler],
    ) -> None:
        self._owner = owner
        self._pipe = pipe
        self._family = family
        self._modules = modules
        self._caches = caches
        self._attention = attention
        self._switch: AttentionSwitch | None = None
        self._forwards = [MethodPatch(module, "forward", forward(module)) for module in modules.values()]
        # a modular pipeline's blocks have these methods, if anything has
        self._of_pipe = [MethodPatch(pipe, name, it) for name, it in pipeline.items() if hasattr(pipe, name)]
        self._scheduler_handlers = scheduler
        self._of_scheduler: list[MethodPatch] = []
        self.scheduler: Any = None

    def put_on(self, config: DDiTConfig) -> None:
        """Patches the transformers, the scheduler and the pipeline; on an error nothing stays patched.

        Raises:
            UnsupportedPipelineError: a component belongs to another accelerated pipeline, is compiled as a whole in
                place, is context parallel in a way that cannot work, or the scheduler's steps are of no known process.
            ConfigError: a cache is to be enabled where there is one, or one is on that coarse steps cannot go with.
        """
        check_process(self._pipe.scheduler, self._family.variance_preserving)
        check_not_compiled(self._modules)
        check_parallel(self._modules, config.cache)
        self._caches.check(config.may_be_coarse)
        for component in (*self._modules.values(), self._pipe.scheduler):
            check_unshared(component)
        try:
            self._caches.enable()
            if self._attention is not None:
                self._switch = AttentionSwitch(map(unwrap_module, self._modules.values()), self._attention.backend)
                self._switch.put_on()
            for module, patch in zip(self._modules.values(), self._forwards):
                self._put_on(module, [patch])
            self._put_on(self._pipe, self._of_pipe)
            self.follow_scheduler()
        except BaseException:
            self.take_off()
            raise

    def take_off(self) -> None:
        """Takes every patch away; modules, outputs and settings are as before :meth:`put_on`."""
        for patch in (*self._forwards, *self._of_scheduler, *self._of_pipe):
            patch.remove()
        for component in (*self._modules.values(), self.scheduler, self._pipe):
            if component is not None:
                release_plain(component)
        self._caches.disable()
        if self._switch is not None:
            self._switch.take_off()
        self.scheduler, self._of_scheduler = None, []

    def follow_scheduler(self) -> None:
        """Moves the scheduler's patches to the one that the pipeline has now; users exchange it at will."""
        scheduler = self._pipe.scheduler
        check_process(scheduler, self._family.variance_preserving)
        check_unshared(scheduler)
        for patch in self._of_scheduler:
            patch.remove()
        if self.scheduler is not None:
            release_plain(self.scheduler)
        self.scheduler = scheduler
        self._of_scheduler = [MethodPatch(scheduler, name, it) for name, it in self._scheduler_handlers.items()]
        self._put_on(scheduler, self._of_scheduler)

    def keep_forwards_outermost(self) -> None:
        """Puts the patches of ``forward`` on top again of what other libraries have put there, or taken away."""
        for patch in self._forwards:
            patch.ensure_outermost()

    def _put_on(self, component: Any, patches: Sequence[MethodPatch]) -> None:
        keep_plain(component, self._owner, patches)
        for patch in patches:
            patch.ensure_outermost()
