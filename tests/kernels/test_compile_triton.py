"""The linear and pooling ops' Triton kernels, compiled ahead of time: no type error or spill waits for a GPU."""

import pytest

from tests.kernels.compilers import H100, TARGETS, assert_no_spills


def cosine_linear_jobs(real):
    """The three kernels of cosine_linear, for vectors of any length."""
    tensors = {
        "inverse_norms_kernel": ("vectors", "inverse"),
        "scale_kernel": ("values", "inverse_x", "inverse_w", "out"),
        "project_kernel": ("grad", "vectors", "inverse"),
    }
    for kernel, names in tensors.items():
        signature = dict.fromkeys(names, "*" + real)
        signature |= {"classes" if kernel == "scale_kernel" else "length": "i32"}
        yield "cosine_linear", kernel, signature, {"BLOCK": 1024}, False


COSINE_LINEAR = [*cosine_linear_jobs("fp32"), *cosine_linear_jobs("fp64")]


def group_linear_job(kernel, x="fp32", weight="fp32", slots=1, cosine=True, bias=False):
    """A kernel of group_linear with the tile that its launcher takes; 16-bit inputs are multiplied in TF32."""
    double = "fp64" in (x, weight)
    computing = "fp64" if double else "fp32"
    kinds = {"x": x, "grad_x": x, "weight": weight, "grad_weight": weight}
    pointers = ("out", "grad_out", "bias", "cosines", "inv_x", "inv_weight")
    signature = {name: "*" + kind for name, kind in (dict.fromkeys(pointers, computing) | kinds).items()}
    signature |= dict.fromkeys(("batch", "groups", "features", "slots", "classes"), "i32")
    signature |= {f"{of}_{by}_stride": "i64" for of in ("x", "grad") for by in ("batch", "group")}
    constants = {"COSINE": cosine, "DOUBLE": double, "PRECISION": "tf32" if x == weight == "bf16" else "ieee"}
    constants |= {"BLOCK_ROWS": 16, "BLOCK_SLOTS": min(slots, 32)}
    tile = 16 if double else 64 if constants["PRECISION"] == "tf32" else 32
    constants |= {"BLOCK_FEATURES": 128 if slots == 1 else tile}
    if not bias and kernel == "group_linear_kernel":
        constants |= {"bias": None, "cosines": None}
    return "group_linear", kernel, signature, constants, False


GROUP_LINEAR_KERNELS = ("group_linear_kernel", "grad_x_kernel", "grad_weight_kernel")
GROUP_LINEAR = [
    *(group_linear_job(kernel) for kernel in GROUP_LINEAR_KERNELS),
    *(group_linear_job(kernel, slots=32, bias=True) for kernel in GROUP_LINEAR_KERNELS),
    *(group_linear_job(kernel, "bf16", "bf16", slots=32) for kernel in GROUP_LINEAR_KERNELS),
    *(group_linear_job(kernel, "fp64", "fp64", slots=32) for kernel in GROUP_LINEAR_KERNELS),
    group_linear_job("group_linear_kernel", "bf16", "fp32", slots=16, cosine=False),
    group_linear_job("grad_weight_kernel", "fp16", "fp32", slots=16),
]


def reweight_pool_jobs(features, channels_last=False, needs_grad=True):
    """The kernels of reweight_pool with the tiles that the launcher takes for 14 x 14 and wider maps."""
    computing = "fp64" if features == "fp64" else "fp32"
    kinds = dict.fromkeys(("features", "out", "grad_out", "grad_features"), "*" + features)
    kinds |= dict.fromkeys(("weight", "weight_slope", "grad_weight"), "*" + computing) | {"argmax": "*i32"}
    tile = {"CHANNELS_LAST": channels_last} | dict(
        zip(("BLOCK_CHANNELS", "BLOCK_POSITIONS"), (64, 32) if channels_last else (8, 256), strict=True)
    )
    kernels = {
        "reweight_pool_kernel": ("features weight out argmax weight_slope", tile | {"NEEDS_GRAD": needs_grad}),
        "grad_features_kernel": ("grad_out weight argmax grad_features", tile),
        "grad_weight_kernel": ("grad_out weight_slope grad_weight", {"BLOCK": 128}),
    }
    for kernel, (tensors, constants) in kernels.items():
        sizes = ("batch", "channels") if kernel == "grad_weight_kernel" else ("channels", "positions")
        signature = {name: kinds[name] for name in tensors.split()} | dict.fromkeys(sizes, "i32")
        yield "reweight_pool", kernel, signature, constants, False


REWEIGHT_POOL = [
    *reweight_pool_jobs("fp32"),
    *reweight_pool_jobs("bf16", channels_last=True),
    *reweight_pool_jobs("fp64"),
    *reweight_pool_jobs("fp64", channels_last=True),
    next(reweight_pool_jobs("fp16", needs_grad=False)),
]
EVERY_JOB = [*COSINE_LINEAR, *GROUP_LINEAR, *REWEIGHT_POOL]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def test_kernels_do_not_spill(compile_triton, target):
    assert_no_spills(EVERY_JOB, compile_triton, target)


def test_group_linear_of_16_bits_runs_on_tensor_cores(compile_triton):
    for job, result in zip(EVERY_JOB, compile_triton(EVERY_JOB, H100), strict=True):
        if job[0] == "group_linear":
            assert ("tf32" in result["text"]) == (job[3]["PRECISION"] == "tf32"), job
