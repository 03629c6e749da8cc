"""``python -m ddit_rt.cli``, as ``accelerate launch`` wants it."""

from . import main

main()
