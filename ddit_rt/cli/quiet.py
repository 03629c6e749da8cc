"""Keeps what other libraries say to programmers off the terminal of ``ddit-rt``.

Importing diffusers' pipelines makes transformers warn about image processors that are never used, once per processor,
wherever torchvision is not installed; loading draws two bars at once. All of it is silenced here, for the command line
alone: ``import ddit_rt`` leaves loggers, warnings and bars as they are.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

_LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "peft", "accelerate", "torch", "torchmetrics")


def quieten() -> None:
    """Sets what the libraries read when they are imported; to be called before that.

    Whoever sets TRANSFORMERS_VERBOSITY, DIFFUSERS_VERBOSITY, HF_HUB_VERBOSITY or PYTHONWARNINGS hears them again.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # torchao and bitsandbytes, which diffusers imports where they are installed, tell of libraries for other machines
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        for library in _LIBRARIES:
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}(\.|$)")
        # diffusers passes it
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")


def hide_loading_bars() -> None:
    """Switches off the bars of loading weights; those of downloads, which may take an hour, stay."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    with_downloads = not are_progress_bars_disabled()
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()  # takes those of downloads along
    if with_downloads:
        enable_progress_bars()
