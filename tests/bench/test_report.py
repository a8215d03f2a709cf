"""The report is one file, the README's table shows what is known, and static figures are arithmetic."""

import json
import re
from collections import Counter

import pytest

from bench import charts, gpu_static, readme, report

MACHINE = {
    "processor": "Some <CPU>",
    "torch": "2.0",
    "commit": "abc",
    "date": "2026-01-01",
    "copy_bandwidth_GBps": 20.0,
    "matrix_rate_GFLOPs": 70.0,
}


def loss_row(labels, mode, mlfast_us, eager_us):
    us = {"mlfast": mlfast_us, "eager": eager_us, "compile": 2 * eager_us}
    ratio = eager_us / mlfast_us
    return {
        "op": "aam_loss",
        "case": f"{'COCO ' if labels == 80 else ''}56 x {labels} {mode}",
        "median_us": us,
        "bytes": labels * 672,
        "operations": labels * 4200,
        "growth": {"over": "B x K", "at": 56 * labels, "curve": mode},
        "percent_of_copy_bandwidth": 10.0,
        "percent_of_roofline": 20.0,
        "ratio_quartiles": {"eager": [0.9 * ratio, ratio, 1.1 * ratio], "compile": [2 * ratio] * 3},
        "peak_bytes": {"mlfast": 1000, "eager": 5000, "compile": 3000},
        "hot_us": us,
    }


ROWS = [loss_row(labels, "training", labels / 2, labels * 2) for labels in (20, 80, 500)]
ROWS += [loss_row(80, "forward", 100.0, 50.0)]
ROWS += [{"op": "call_overhead", "case": "1 x 1 training", "median_us": {"mlfast": 100.0, "x.sum()": 40.0}}]
GROWTH_ALONE = {"over": "K", "curve": "mlfast alone"}
ROWS += [
    {
        "op": "graph",
        "case": f"K {k}",
        "mode": "training",
        "median_us": {"mlfast": k},
        "growth": {**GROWTH_ALONE, "at": k},
    }
    for k in (10, 100, 1000)
]
RESULTS = {"machine": MACHINE, "rows": ROWS}
COUNTED = {"special_per_element": 2.0, "counted": 2, "counted_as": "an exponential and a reciprocal"}
KERNEL = {"op": "aam_loss", "language": "Triton", "kernel": "k", "variant": "scores fp32", "threads": 128}
KERNEL |= gpu_static.figures(90, 128, 51, 0, 1024) | COUNTED
KERNEL |= {"loop": {"special": 8, "float32": 9, "tensor": 0, "memory": {"LDG.E.128": 1}}}
STATIC = {"tools": {"nvcc": "13.0"}, "commit": "abc", "kernels": [KERNEL]}


@pytest.fixture(scope="module")
def page():
    return report.page(RESULTS, STATIC)


def test_the_page_needs_nothing_else(page):
    text, pictures = re.subn(r'src="data:image/png;base64,[\w+/=]+"', "", page)
    assert pictures == 4  # ratios, roofline, growth of two ops
    assert not re.findall(r"//|src=|href|<script|<link|@import|url\(", text)


def test_the_page_says_what_was_measured(page):
    assert "Some &lt;CPU&gt;" in page and "<CPU>" not in page
    assert "160 (4.0x)" in re.sub(r" +", " ", page).replace("( ", "(")
    assert page.count('class="loses"') == 1  # forward, against eager; compile is as fast as mlfast
    assert "it takes 2.00 times as long as eager" in page
    assert "in a loop of its own" in page and "static figures, no speeds" in page and "an exponential" in page


def test_a_page_of_older_results_has_fewer_columns_but_renders():
    row = {"op": "aam_loss", "case": "c training", "median_us": {"mlfast": 1.0, "eager": 2.0}}
    machine = {key: value for key, value in MACHINE.items() if key != "matrix_rate_GFLOPs"}
    assert "Roofline</h2>" not in report.page({"machine": machine, "rows": [row]}, None)


def test_the_summary_is_a_small_picture(tmp_path):
    charts.save(charts.summary([RESULTS, RESULTS]), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size < 100_000


def test_the_readme_shows_the_columns_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    text = "\n".join(readme.section(path))
    assert "| aam_loss, COCO 56 x 80 | 40 µs | 4.0x | 8.0x | 10 % | 20 % | 1 kB (3.0x) |" in text
    assert "| aam_loss, COCO 56 x 80, in a loop of its own | 40 µs | 4.0x | 8.0x |  |  |  |" in text
    assert "| aam_loss, 56 x 500 | 250 µs |" in text and "56 x 20 " not in text  # the usual size, and the largest
    assert "| graph, K 10 |" not in text
    assert "**Where mlfast loses**" in text
    assert "\n- aam_loss: COCO 56 x 80 forward, 2.00 (eager)" in text
    assert "One label, forward + backward: 100 µs; PyTorch's `x.sum()`: 40 µs." in text
    assert "matrix rate 70.0 GFLOP/s" in text


def test_the_overview_has_a_column_for_each_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "a.json").write_text(json.dumps(RESULTS))
    kernels = {"mlfast": 10.0, "eager": 5.0, "compile": None}
    mine = [row | {"case": "COCO 9 x 9 training", "kernel_us": kernels, "commit": "abc"} for row in RESULTS["rows"][:1]]
    gpu = RESULTS["machine"] | {"processor": "A GPU, CUDA 1"}
    (results / "gpu.json").write_text(json.dumps({"machine": gpu, "rows": mine}))
    text = readme.overview()
    assert f"| {MACHINE['processor']} | A GPU, CUDA 1 | A GPU, CUDA 1, kernels alone |" in text
    assert "| aam_loss, COCO 56 x 80 | 40 µs, 4.0x |  |  |" in text
    assert "| aam_loss, COCO 9 x 9 |  | 10 µs, 4.0x | 10 µs, **0.5x** |" in text
    assert "wins 1 and loses 0, taking whole calls. 1 rows are of abc." in text


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "percent"),
    [
        (90, 256, 32, 0, 100),
        (90, 256, 64, 0, 50),
        (90, 256, 65, 0, 38),
        (80, 128, 255, 0, 12),
        (80, 256, 32, 65536, 25),
    ],
)
def test_occupancy(arch, threads, registers, shared, percent):
    assert gpu_static.occupancy(arch, threads, registers, shared) == percent


def test_the_main_loop_is_the_first_that_touches_memory():
    sass = """
        /*0000*/                   S2R R5, SR_CTAID.X ;
        /*0010*/                   MUFU.RCP R0, R0 ;
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   FFMA R4, R4, R5, R6 ;
        /*0070*/              @P1 BRA 0xa0 ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/             @!UP0 BRA 0x40 ;
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/                   BRA 0xb0;
    """
    code = [(int(at, 16), name, rest) for at, name, rest in gpu_static.INSTRUCTION.findall(sass)]
    assert len(code) == 12
    found = gpu_static.main_loop(code)
    assert found == Counter({"LDG.E.128": 1, "MUFU.EX2": 1, "FFMA": 1, "BRA": 2, "STG.E.128": 1})
    memory = {"LDG.E.128": 1, "STG.E.128": 1}
    assert gpu_static.loop_figures(found) == {"special": 1, "float32": 1, "tensor": 0, "memory": memory}
