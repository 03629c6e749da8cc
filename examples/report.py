"""What a report holds: every step with its size, σ, cost and time; as a table, as JSON, as a figure.

python examples/report.py [FOLDER]
"""

import sys
from pathlib import Path

import ddit_rt
from ddit_rt.demo import CALL_DEFAULTS, load_pipeline


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
    folder.mkdir(parents=True, exist_ok=True)
    pipe = ddit_rt.accelerate(load_pipeline(), threshold=0.01)
    pipe("a red apple on a black background", **{**CALL_DEFAULTS, "num_inference_steps": 16})

    report = ddit_rt.report(pipe)
    print(report)
    coarse = [step for step in report.steps if step.multiple > 1]
    tokens = sum(step.tokens for step in report.steps)
    print(f"{len(coarse)} coarse steps; {tokens} tokens instead of {len(report.steps) * report.steps[0].tokens}")
    report.to_json(folder / "report.json")
    print(f"written: {folder / 'report.json'}, {report.plot(folder / 'report.png')}")


if __name__ == "__main__":
    main()
