"""ComfyUI: flow models whose sampling runs skip steps and make steps on coarse tokens.

What needs no ComfyUI stands here; the nodes are in ``integrations/comfyui`` of the repository.
"""

from .acceleration import Acceleration, attach, attached, settings

__all__ = ["Acceleration", "attach", "attached", "settings"]
