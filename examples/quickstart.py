"""The shortest way: accelerate a pipeline, draw a picture, look at the report, take the acceleration off again.

    python examples/quickstart.py [FOLDER]

runs on the demo model in seconds. For FLUX or Wan only the line that loads the pipeline is another.
"""

import sys
from pathlib import Path

import torch

import ddit_rt
from ddit_rt.demo import CALL_DEFAULTS, load_pipeline

CALL = {**CALL_DEFAULTS, "num_inference_steps": 16}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline()

    ddit_rt.accelerate(pipe, speedup=2)
    picture = pipe("zebras behind a fence", generator=torch.Generator().manual_seed(0), **CALL).images[0]
    picture.save(folder / "quickstart.png")
    print(ddit_rt.report(pipe))

    ddit_rt.restore(pipe)  # the plain pipeline again, bit for bit
    print(f"picture in {folder / 'quickstart.png'}")


if __name__ == "__main__":
    main()
