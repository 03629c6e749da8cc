"""A custom block for Modular Diffusers: accelerates the pipeline that it is put into (pip install ddit-rt)."""

from ddit_rt.integrations.modular import DDiTAccelerateStep


class DDiTBlock(DDiTAccelerateStep):
    """Named here, where diffusers looks for the class of a custom block."""
