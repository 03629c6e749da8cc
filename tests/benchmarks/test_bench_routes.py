"""The routes to the wanted times: what a lever does to a kernel, and that the committed figures are those computed."""

import json

import on_paper
import paper_levers as levers
import pytest
import readme
from paper_count import Gpu, Operation, rows
from paper_routes import LEVERS, Choice, routes, seconds
from route_tables import routes_table
from store import ROOT

GPU = Gpu("H200", processors=4, flops=1e12, bandwidth=1e15, eight=2e12)


def product(m, n, k, count=1):
    """A linear layer in bf16."""
    return Operation(2.0 * m * n * k * count, (m, n, count), False, 2.0 * (m * k + k * n + m * n) * count)


CHAIN = Operation(0.0, (0, 0, 0), False, 1e6)
ONE_ROW = product(1, 6144, 1024)


def test_eight_bits_halve_operands_and_share_what_follows_each_other():
    layer, other = product(1024, 2048, 512), product(1024, 4096, 512)
    small, attention = product(1024, 64, 512), Operation(1e9, (1024, 128, 24), True, 1e6)
    found = levers.eight_bits([layer, other, CHAIN, small, attention, ONE_ROW])
    scaled, first, second, *rest = found
    assert rest == [CHAIN, small, attention, ONE_ROW]
    assert scaled.flops == 0 and scaled.bytes == 3 * 1024 * 512
    assert first.eight and first.bytes == layer.bytes - 512 * (1024 + 2048)
    assert second.bytes == other.bytes - 512 * (1024 + 4096)
    assert first.seconds(GPU, waves=False) == pytest.approx(layer.flops / (2e12 * 0.6))


def test_layers_that_read_the_same_are_one():
    q, mlp = product(1024, 3072, 3072), product(1024, 12288, 3072)
    together, chain, alone = levers.together([q, q, q, CHAIN, mlp])
    assert (chain, alone) == (CHAIN, mlp)
    assert together.tiles == (1024, 9216, 1) and together.flops == 3 * q.flops
    assert together.bytes == product(1024, 9216, 3072).bytes
    assert levers.together([q, product(512, 3072, 3072)]) == [q, product(512, 3072, 3072)]


def test_the_mlp_enters_with_qkv_where_both_read_the_same():
    mlp, qkv, out = product(1024, 12288, 3072), product(1024, 9216, 3072), product(1024, 3072, 3072)
    one, chain, last = levers.with_feed_forward([mlp, CHAIN, qkv, out])
    assert (chain, last) == (CHAIN, out) and one == product(1024, 21504, 3072)
    for apart in ([out, CHAIN, mlp], [mlp, CHAIN, CHAIN, qkv], [mlp, CHAIN, product(512, 9216, 3072)], [mlp, CHAIN]):
        assert levers.with_feed_forward(apart) == apart


def test_modulations_of_all_steps_read_their_weights_once():
    left = levers.without_modulation([CHAIN, ONE_ROW, product(2, 6144, 1024)])
    assert left == [CHAIN, product(2, 6144, 1024)]
    (ahead,) = levers.modulation_ahead([CHAIN, ONE_ROW], 28)
    assert ahead == product(28, 6144, 1024)


def test_few_bits_of_weights_are_fewer_bytes_alone():
    layer = product(1024, 2048, 512)
    (four,) = levers.narrow_weights([layer], 4)
    assert four.flops == layer.flops and not four.eight and layer.bytes - four.bytes == 1.5 * 2048 * 512


def test_flux_has_the_layers_that_levers_ask_for():
    step = rows("flux")[1].fused
    linear, modulation = levers.weight_bytes(step)
    assert modulation == pytest.approx(6.5e9, rel=0.02) and linear + modulation == pytest.approx(23.8e9, rel=0.01)
    # 19 double blocks: QKV of picture and text; 38 single ones
    joined = levers.together(step)
    assert len(step) - len(joined) == 2 * (19 * 2 + 38)
    compiled = levers.together(rows("flux")[1].fused)
    assert len(compiled) - len(levers.with_feed_forward(compiled)) == 38


def test_every_lever_helps_and_a_schedule_runs_what_it_says():
    h200 = on_paper.GPUS[-1]
    choice = Choice("2x", (1, 0) * 14, (None, None))
    whole = seconds("flux", h200, choice, LEVERS[:1])
    assert seconds("flux", h200, choice, LEVERS[:2]) == pytest.approx(whole / 2)
    committed = json.loads((readme.RESULTS / "on-paper" / "routes.json").read_text(encoding="utf-8"))
    for model in committed["models"].values():
        for schedule in model["schedules"]:
            coarse = bool({2, 4} & set(schedule["multiples"]))
            names = [entry["lever"] for entry in schedule["levers"]]
            assert ("guidance in one batch" in names) == (coarse and model is committed["models"]["wan"])
            assert ("short text in coarse steps" in names) == (coarse and model is committed["models"]["flux"])
            for gpu in schedule["every_wave_full"]:
                times = [entry["seconds"][gpu] for entry in schedule["levers"]]
                assert times == sorted(times, reverse=True) and times[2] < times[1] < times[0]


def test_every_row_of_the_committed_routes_is_what_is_computed():
    committed = json.loads((readme.RESULTS / "on-paper" / "routes.json").read_text(encoding="utf-8"))
    computed = json.loads(json.dumps(routes(on_paper.GPUS)))
    again = "run python benchmarks/on_paper.py --save benchmarks/results/on-paper/routes.json"
    for model, found in computed.pop("models").items():
        kept = committed["models"].pop(model)
        for ours, theirs in zip(found.pop("schedules"), kept.pop("schedules"), strict=True):
            name = f"{model}, {ours['name']}"
            for row, known in zip(ours.pop("levers"), theirs.pop("levers"), strict=True):
                assert row == known, f"{name}, {row['lever']}: {again}"
            assert ours == theirs, f"{name}: {again}"
        assert found == kept, f"{model}: {again}"
    assert not committed.pop("models") and computed == committed, again


def test_the_page_holds_every_row_of_them():
    page = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    committed = json.loads((readme.RESULTS / "on-paper" / "routes.json").read_text(encoding="utf-8"))
    shown = page.partition("<!-- routes-table -->")[2].partition("<!-- /routes-table -->")[0].strip()
    assert shown == routes_table(committed).strip(), "run python benchmarks/readme.py"
    for model in committed["models"].values():
        rows = [line for line in shown.splitlines() if line.startswith("| ")]
        first, *others = model["schedules"]
        # levers, bound, narrow weights, two for each further schedule, ends
        ladder = len(first["levers"]) + 2 + 2 * len(others) + 1
        begin = next(i for i, line in enumerate(rows) if line.startswith(f"| {model['title']} |"))
        table = rows[begin + 1 : begin + 1 + ladder]
        assert len(table) == ladder and all(line.count("|") == len(committed["memory_gb"]) + 2 for line in table)


def test_the_table_says_what_is_and_is_not_reached():
    committed = json.loads((readme.RESULTS / "on-paper" / "routes.json").read_text(encoding="utf-8"))
    flux = committed["models"]["flux"]
    for schedule in flux["schedules"]:
        for entry in schedule["levers"]:
            entry["seconds"] = dict.fromkeys(entry["seconds"], 9.0)
    text = routes_table(committed)
    assert "nothing reaches (2x takes 9.00 s) with attention in 16 bits" in text
    assert "in bf16 they do not fit the RTX 4090" in text
    flux["schedules"][1]["levers"][-2]["seconds"]["H200"] = 0.5
    assert "which is reached at 3x with attention in 16 bits, and nothing reaches" in routes_table(committed)
