"""Nodes of ComfyUI for flow models with ddit_rt's schedules; what they do is in ``ddit_rt.integrations.comfyui``."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
