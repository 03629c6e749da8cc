"""Fills the tables and draws the figures of the README and of the documentation from committed results.

    python benchmarks/readme.py [--demo DEMO-OUT] [--pictures]

Tables stand between markers such as ``<!-- results-table -->``. Their numbers come from ``benchmarks/results/*`` (see
``benchmarks/evaluations.py``) and from ``docs/demo/demo.json``, which --demo renews from what ``ddit-rt demo`` wrote.
--pictures also runs the demo models for the pictures and clips that stand side by side, which takes some minutes on a
CPU. The page on video is filled from what lies under ``benchmarks/results/demo-video``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import coarse_tables
import few_steps
import markers
import paper_longer
import readme_figures as figures
import readme_tables as tables
import target_tables
import video_figures
import video_tables
from evaluations import Evaluation
from route_tables import routes_table
from serve_tables import serve_table

from ddit_rt.pipeline import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("evaluation", "runtime", "targets", "serving", "video", "coarse-steps")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCUMENTS))
FIGURES = ROOT / "docs" / "demo"
SHOWCASE = FIGURES / "demo.json"
RESULTS = ROOT / "benchmarks" / "results"
VIDEO = RESULTS / "demo-video"
GAIN = "coarse-gain.json"
TARGETS = {
    "targets-table": ("demo-targets/evaluation.json", 50),
    "targets-unguided-table": ("demo-targets/evaluation-unguided.json", 50),
    "targets-28-table": ("demo-targets/evaluation-28.json", 28),
    "targets-28-unguided-table": ("demo-targets/evaluation-28-unguided.json", 28),
    "targets-256-table": ("demo-256/evaluation.json", 50),
}
"""Marker -> where an evaluation of targets lies, and its plain steps."""
UNUSED = ("patch_std", "tokens", "pictures")
"""Parts of a demo's result that no table shows."""


def contents() -> dict[str, str]:
    """Marker -> the text that belongs between its two ends."""
    evaluation, guided, options = (
        Evaluation.read(RESULTS / name / "evaluation.json") for name in ("demo", "demo-guided", "demo-options")
    )
    analyses = json.loads((RESULTS / "demo" / "analyses.json").read_text(encoding="utf-8"))
    targets = {name: Evaluation.read(RESULTS / file) for name, (file, _) in TARGETS.items()}
    found = {
        "misses-table": target_tables.misses_table(
            json.loads((RESULTS / "demo-targets" / "misses.json").read_text(encoding="utf-8"))
        ),
        "adapting-table": target_tables.adapting_table(
            [
                json.loads((RESULTS / "demo-targets" / name).read_text(encoding="utf-8"))
                for name in ("adapting.json", "adapting-28.json")
            ]
        ),
        "joint-table": target_tables.joint_table(
            json.loads((RESULTS / "demo-targets" / "joint-weights.json").read_text(encoding="utf-8"))
        ),
        "few-steps-table": few_steps.few_steps_table(
            json.loads((RESULTS / "demo-few" / "few-steps.json").read_text(encoding="utf-8"))
        ),
        "between-table": target_tables.between_table(targets["targets-table"], 50),
        "targets-all-table": tables.evaluation_table(targets["targets-table"], 50),
        "longer-paper-table": paper_longer.table(
            json.loads((RESULTS / "on-paper" / "longer.json").read_text(encoding="utf-8"))
        ),
        "routes-table": routes_table(json.loads((RESULTS / "on-paper" / "routes.json").read_text(encoding="utf-8"))),
        "serve-table": serve_table(json.loads((RESULTS / "serve" / "serve.json").read_text(encoding="utf-8"))),
        "results-table": tables.short_table(evaluation),
        "demo-table": tables.demo_tables(json.loads(SHOWCASE.read_text(encoding="utf-8"))),
        "evaluation-table": tables.evaluation_table(evaluation, 50),
        "evaluation-28-table": tables.evaluation_table(evaluation, 28),
        "paired-table": tables.paired_table(evaluation),
        "guided-table": tables.evaluation_table(guided, 50),
        "options-table": tables.options_table(options),
        "trim-table": tables.options_table(Evaluation.read(RESULTS / "demo-trim" / "evaluation.json")),
    }
    found |= {
        f"{name}-table": tables.analyses_table(lines) for name, lines in analyses.items() if isinstance(lines, list)
    }
    found |= {name: target_tables.targets_table(targets[name], steps) for name, (_, steps) in TARGETS.items()}
    return found | video_contents() | coarse_contents()


def coarse_contents() -> dict[str, str]:
    """Those of the page on what coarse steps are worth; of results that are not there, none."""
    found, news = {}, {}
    for model in SHIPPED:
        folder = RESULTS / model
        if (folder / "coarse.json").is_file():
            news[model] = json.loads((folder / "coarse.json").read_text(encoding="utf-8"))
        if (folder / GAIN).is_file():
            result = json.loads((folder / GAIN).read_text(encoding="utf-8"))
            found[f"coarse-gain-{model}-table"] = coarse_tables.gain_table(result)
    return found | ({"news-table": coarse_tables.news_table(news)} if news else {})


def video_contents() -> dict[str, str]:
    """Those of the page on video; of results that are not there, none."""
    found = {}
    if (VIDEO / "evaluation.json").is_file():
        evaluation = Evaluation.read(VIDEO / "evaluation.json")
        most, fewer = sorted({method.reference for method in evaluation.plan.methods}, reverse=True)
        found = {
            "video-table": video_tables.video_table(evaluation, most),
            "video-28-table": video_tables.video_table(evaluation, fewer),
            "video-tau-table": video_tables.tau_table(evaluation, most),
            "video-figures": video_figures.links(FIGURES / "video", FIGURES.parent),
        }
        if (VIDEO / "spread.json").is_file():
            spread = json.loads((VIDEO / "spread.json").read_text(encoding="utf-8"))
            found["video-growth"] = video_tables.growth_table(evaluation, most, spread)
    if (VIDEO / "longer.json").is_file():
        found["longer-table"] = video_tables.longer_table(json.loads((VIDEO / "longer.json").read_text("utf-8")))
    return found


def fill(text: str, found: dict[str, str]) -> str:
    """``text`` with the contents of ``found`` between those of their markers that it has."""
    for name, content in found.items():
        if markers.has(text, name):
            text = markers.put(text, name, content)
    return text


def take_demo(folder: Path) -> None:
    """Keeps, of what ``ddit-rt demo`` measured, what the tables show."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items() if name not in UNUSED}
        return value

    result = kept(json.loads((folder / "demo.json").read_text(encoding="utf-8")))
    SHOWCASE.write_text(json.dumps(result) + "\n", encoding="utf-8")


def draw() -> None:
    """The figures that need no model run."""
    evaluation = Evaluation.read(RESULTS / "demo" / "evaluation.json")
    figures.curve(Evaluation.read(RESULTS / "demo-targets" / "evaluation.json"), FIGURES / "curve.png")
    figures.all_curves(evaluation, FIGURES / "evaluation")
    figures.all_curves(Evaluation.read(RESULTS / "demo-guided" / "evaluation.json"), FIGURES / "guided")
    figures.fitted(FIGURES / "fitted.png")
    analyses = json.loads((RESULTS / "demo" / "analyses.json").read_text(encoding="utf-8"))
    figures.analyses(analyses, FIGURES / "analyses")
    for model in SHIPPED:
        if (RESULTS / model / GAIN).is_file():
            result = json.loads((RESULTS / model / GAIN).read_text(encoding="utf-8"))
            figures.gain(result, FIGURES / "coarse" / f"{model}.png")
    if (VIDEO / "evaluation.json").is_file():
        spread = VIDEO / "spread.json"
        along = json.loads(spread.read_text(encoding="utf-8"))["psnr_frames"] if spread.is_file() else ()
        video_figures.curves(Evaluation.read(VIDEO / "evaluation.json"), FIGURES / "video", along)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, help="output folder of `ddit-rt demo` to take new measurements from")
    parser.add_argument("--pictures", action="store_true", help="run the demo model for the pictures too")
    options = parser.parse_args()
    if options.demo is not None:
        take_demo(options.demo)
    draw()
    if options.pictures:
        evaluation = Evaluation.read(RESULTS / "demo" / "evaluation.json")
        targets = Evaluation.read(RESULTS / "demo-targets" / "evaluation.json")
        figures.side_by_side(targets, figures.PICTURE, 2, FIGURES / "picture.webp", print, gain=5)
        figures.side_by_side(evaluation, figures.SHEET, 5, FIGURES / "methods.webp", print)
        if (VIDEO / "evaluation.json").is_file():
            video_figures.clips(Evaluation.read(VIDEO / "evaluation.json"), FIGURES / "video", print)
    found = contents()
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
