"""The losses' Triton kernels, compiled ahead of time: no type error, spill or narrow access waits for a GPU."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from mlfast.kernels.elementwise_loss import register_limit
from tests.kernels.compilers import H100, TARGETS, assert_no_spills, resources


def loss_job(
    op, scores="bf16", target="i8", weighted=False, grad=True, mean=False, elementwise=False,
    powers=(0, 1), smoothed=False, sparse=False, **variant,
):  # fmt: skip
    """With what the launcher specialises the kernel of a loss."""
    computing = "fp64" if scores == "fp64" else "fp32"
    optional = {
        "indptr": (sparse, "i64"),
        "class_weight": (weighted, computing),
        "grad": (grad, scores),
        "inv_known": (mean, computing),
    }
    signature = {"scores": scores, "target": target, "loss": computing, "workspace": "u8"}
    signature |= {name: kind for name, (present, kind) in optional.items() if present}
    signature = {name: "*" + kind for name, kind in signature.items()} | {"n": "i64", "classes": "i32"}
    signature |= dict.fromkeys(NUMBERS[op], "fp64")
    constants = {name: None for name, (present, _) in optional.items() if not present}
    constants |= {"ELEMENTWISE": elementwise, "SMOOTHED": smoothed, "POWER_POS": powers[0], "POWER_NEG": powers[1]}
    constants |= VARIANT[op] | variant | {"MAX_PROGRAMS": 1024, "BLOCK": 512}
    options = register_limit(scores == "fp64", target[0] in "fb", sparse and -1 in powers)
    return op, f"{op}_kernel", signature, constants, options


def scale_grad_job(grad):
    signature = {"grad": "*" + grad, "factor": "*fp64" if grad == "fp64" else "*fp32", "n": "i64"}
    return "elementwise_loss", "scale_grad_kernel", signature, {"BLOCK": 512}, {}


AAM, ASL = "aam_loss", "asymmetric_loss"
SHARED_NUMBERS = ("weight_pos", "weight_neg", "gamma_pos", "gamma_neg", "label_smoothing")
NUMBERS = {AAM: ("scale", "margin", "prob_shift", *SHARED_NUMBERS), ASL: ("clip", *SHARED_NUMBERS)}
VARIANT = {AAM: {"MARGIN": False, "SHIFTED": False}, ASL: {"CLIPPED": True, "DETACHED": False}}
REAL = (-1, -1)
VARIANTS = [
    loss_job(AAM, mean=True),  # the most used
    loss_job(ASL, mean=True, powers=(0, 4)),
    loss_job(AAM, "fp32", weighted=True, mean=True, powers=(1, 4), MARGIN=True),
    loss_job(AAM, "fp16", "i64", elementwise=True, powers=REAL, MARGIN=True),
    loss_job(ASL, "fp32", "i16", smoothed=True, DETACHED=True),
    loss_job(AAM, "bf16", "i32", weighted=True, powers=REAL, MARGIN=True, SHIFTED=True),
    loss_job(AAM, "fp32", "fp32", weighted=True, mean=True, powers=REAL, MARGIN=True, SHIFTED=True),
    loss_job(ASL, "fp32", "fp32", weighted=True, mean=True, powers=REAL),
    loss_job(AAM, "bf16", "bf16"),
    loss_job(ASL, "fp16", "fp16", elementwise=True, grad=False, powers=(0, 0), CLIPPED=False),
    loss_job(ASL, "bf16", "fp32", weighted=True, mean=True, DETACHED=True),
    loss_job(AAM, "fp32", "i16", smoothed=True),
    loss_job(AAM, "fp64", "fp64", weighted=True, mean=True, powers=REAL, MARGIN=True, SHIFTED=True),
    loss_job(ASL, "fp64", "i8", powers=(7, 3)),
    loss_job(AAM, "bf16", "i32", sparse=True, mean=True),
    loss_job(ASL, "fp32", "i64", sparse=True, weighted=True, mean=True, powers=REAL),
    loss_job(AAM, "fp32", "i32", sparse=True, smoothed=True),
    loss_job(AAM, "fp32", "i64", sparse=True, weighted=True, mean=True, powers=REAL, MARGIN=True, SHIFTED=True),
    *map(scale_grad_job, ("fp32", "bf16", "fp16", "fp64")),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def test_variants_do_not_spill(compile_triton, target):
    assert_no_spills(VARIANTS, compile_triton, target)


def test_variants_leave_registers_to_other_programs(compile_triton):
    """With 96 registers, a fifth of a multiprocessor's serve a program of 128 threads; with 128, a quarter."""
    for job, result in zip(VARIANTS, compile_triton(VARIANTS, H100), strict=True):
        if "*fp64" not in job[2].values():
            most = 128 if job[2].get("indptr") and -1 in (job[3]["POWER_POS"], job[3]["POWER_NEG"]) else 96
            assert resources(result["usage"])["REG"] <= most, job


def test_full_tiles_use_wide_accesses(compile_triton):
    ptx = compile_triton(VARIANTS, H100)[2]["text"]  # float32 scores, one-byte targets, four elements a thread
    assert re.search(r"^\s*ld\.global\.v4\.b32", ptx, re.MULTILINE)
    assert re.search(r"^\s*st\.global\.v4\.b32", ptx, re.MULTILINE)


def test_counts_elements_in_64_bits(compile_triton):
    for job, result in zip(VARIANTS, compile_triton(VARIANTS, H100), strict=True):
        loops = re.findall(r"= scf\.for |scf\.for ", result["ttir"])
        counters = re.findall(r"scf\.for [^\n]*?: (i\d+) ", result["ttir"])
        assert loops, job
        assert counters == ["i64"] * len(loops), job


def test_rounds_bfloat16_to_nearest(compile_triton):
    """The interpreter cuts off instead, so only the code for GPUs can show it."""
    assert "cvt.rn.bf16" in compile_triton(VARIANTS, H100)[0]["text"]


def test_orders_partials_before_the_ticket(compile_triton):
    """Partials are stored, then a barrier, then the ticket is drawn with acq_rel, then partials are read around L1."""
    ptx = compile_triton(VARIANTS, H100)[0]["text"]
    events = re.findall(r"st\.global\.b64|bar\.sync|atom\.[\w.]+|ld\.global\.cg\.b64", ptx)
    ticket = events.index("atom.global.gpu.acq_rel.add.u32")
    assert events[ticket - 3 : ticket + 2] == ["st.global.b64"] * 2 + ["bar.sync", events[ticket], "bar.sync"]
    assert "ld.global.cg.b64" not in events[:ticket]
    assert events.count("ld.global.cg.b64") == 16  # 1024 partials of two kinds, 128 threads
