"""Inside other engines: what each of them needs to run its models with ddit_rt's schedules. A module for each.

SGLang and vLLM-Omni find their plug-in by an entry point, and import it then.
"""

from . import cache_dit
from .cache_masks import cache_mask, sglang_environment

__all__ = ["cache_dit", "cache_mask", "sglang_environment"]
