"""What the README and the documentation show of results is what the committed results give."""

import json

import markers
import pytest
import readme
import readme_tables
from evaluations import Evaluation, condense, condense_analyses, read_reports

from ddit_rt.evaluate import Method, Plan, summarise
from ddit_rt.evaluate.sweep import RowWriter
from ddit_rt.schedule import Report, StepRecord


def test_every_table_is_up_to_date():
    found, marked = readme.contents(), set()
    for page in readme.PAGES:
        text = page.read_text(encoding="utf-8")
        assert readme.fill(text, found) == text, f"{page.name}: run python benchmarks/readme.py"
        marked |= {name for name in found if f"<!-- {name} -->" in text}
    assert marked == set(found), "every table has a place"


def test_filling_changes_what_is_between_the_markers_alone():
    text = "before <!-- a --> old <!-- /a --> after"
    assert readme.fill(text, {"a": "new", "b": "other"}) == "before <!-- a -->\nnew\n<!-- /a --> after"
    with pytest.raises(SystemExit, match="add the two markers"):
        markers.put(text, "b", "other")


@pytest.fixture(params=[False, True], ids=["plain", "converged"])
def run(request, tmp_path):
    """A folder as ``ddit-rt eval`` leaves it: two methods, two prompts, two seeds, a judge, one or two references."""
    folder = tmp_path / "run"
    methods = [Method("base", "base", 4, 4), Method("half", "fewer steps", 2, 4)]
    plan = Plan("demo", methods, ["a", "b"], [0, 1], {"height": 64}, converged=request.param)
    plan.write(folder)
    writer = RowWriter(folder / "rows.jsonl")
    for method in methods:
        writer.add({"method": method.name, "flops": 10.0 * method.steps})
        for number, (prompt, seed) in enumerate((p, s) for p in (0, 1) for s in (0, 1)):
            own = {"seconds": 1.0 / 3 + number, "reference_seconds": 2.0, "psnr": 30.0 + number, "ssim": 0.9}
            if request.param:
                own |= {"psnr_converged": 25.0 + number + (method.name == "half"), "ssim_converged": 0.8}
            writer.add({"method": method.name, "prompt": prompt, "seed": seed, "schedule": [1, 1], **own})
    metrics = [
        {"method": m.name, "metrics": {"psnr": 1.0, "adherence": 0.75}, "spread": {"adherence": 0.25}} for m in methods
    ]
    (folder / "results.json").write_text(json.dumps({"results": metrics}))
    return folder


def test_a_condensed_evaluation_gives_the_summaries_of_its_rows(run, tmp_path):
    from ddit_rt.evaluate import read_rows

    condense(run, tmp_path / "evaluation.json")
    found = Evaluation.read(tmp_path / "evaluation.json")
    assert found.plan == Plan.read(run)
    own = found.summaries()
    for summary, whole in zip(own, summarise(found.plan, read_rows(run)), strict=True):
        assert (summary.method, summary.runs, summary.flops_speedup) == (whole.method, 4, whole.flops_speedup)
        assert summary.speedup == pytest.approx(whole.speedup, rel=1e-5)
        assert (summary.metrics.pop("adherence"), summary.spread.pop("adherence")) == (0.75, 0.25)
        assert summary.metrics == pytest.approx(whole.metrics) and summary.spread == pytest.approx(whole.spread)
        assert summary.worst == pytest.approx(whole.worst)
    assert own[1].flops_speedup == 2.0
    assert [row["psnr"] for row in found.rows if row["method"] == "half" and "psnr" in row] == [30.0, 31.0, 32.0, 33.0]


def test_tables_show_the_second_reference_where_there_is_one(run, tmp_path, monkeypatch):
    condense(run, tmp_path / "evaluation.json")
    found = Evaluation.read(tmp_path / "evaluation.json")
    monkeypatch.setattr(readme_tables, "SHORT", {"half": "half the steps"})
    monkeypatch.setattr(readme_tables, "PAIRS", (("half", "base"), ("half", "not there")))
    both = found.plan.converged
    *_, head, _, base, half = readme_tables.evaluation_table(found, 4).splitlines()
    assert ("to converged" in head) == both and len({line.count("|") for line in (head, base, half)}) == 1
    assert ("| 26.5 ± 1.1 | 25.0 |" in base) == ("| 27.5 ± 1.1 | 26.0 |" in half) == both
    assert "| 31.5 ± 1.1 | 30.0 | 0.900 |" in half and "| - | - | - |" in base
    head, _, pair = readme_tables.paired_table(found).splitlines()
    assert pair.endswith("| +1.0 | +1.0 to +1.0 | 0.12 | 4 of 4 |") == both and head.count("|") == pair.count("|")
    monkeypatch.setattr(readme_tables, "PLAIN", "base")
    lines = readme_tables.short_table(found).splitlines()
    assert len(lines) == 3 + both and lines[-1].endswith("| 27.5 | 26.0 |") == both


def test_an_unfinished_evaluation_is_not_condensed(run, tmp_path):
    lines = (run / "rows.jsonl").read_text().splitlines()
    (run / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(SystemExit, match="half lacks 1 of 4 runs"):
        condense(run, tmp_path / "evaluation.json")
    (run / "results.json").unlink()
    with pytest.raises(SystemExit, match="--report"):
        condense(run, tmp_path / "evaluation.json")


def test_condensed_reports_keep_what_figures_show(tmp_path):
    steps = [StepRecord(i, 1.0, 0.5, k, 9, {1: 0.1 / 3, 2: 0.2} if i else {}) for i, k in enumerate((1, 2))]
    report = Report(steps, {"multiples": [1, 2], "threshold": 0.5, "coarse": "delta"}, complete=True)
    (tmp_path / "sigma.json").write_text(json.dumps({"a prompt": json.loads(report.to_json())}))
    (tmp_path / "tau.json").write_text(json.dumps([{"label": "τ", "psnr": 100 / 3}]))
    condense_analyses(tmp_path, tmp_path / "all.json")
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["tau"] == [{"label": "τ", "psnr": 33.3333}]
    kept = read_reports(content["sigma"])["a prompt"]
    assert kept.schedule == [1, 2] and kept.config == {"multiples": [1, 2], "threshold": 0.5}
    assert [step.patch_std for step in kept.steps] == [{}, {1: 0.0333333, 2: 0.2}]
