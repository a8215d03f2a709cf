"""The linear and pooling ops' Triton kernels, compiled ahead of time: no type error or spill waits for a GPU."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from mlfast.kernels import group_linear_few_slots as few
from mlfast.kernels import group_linear_products as products
from mlfast.kernels import reweight_pool as pool
from mlfast.kernels.group_linear import tile
from tests.kernels.compilers import H100, TARGETS, assert_no_spills


def cosine_linear_jobs(real):
    """The three kernels of cosine_linear, for vectors of any length."""
    tensors = {
        "inverse_norms_kernel": ("x", "weight", "inverse_x", "inverse_w"),
        "scale_kernel": ("values", "inverse_x", "inverse_w", "out"),
        "project_kernel": ("x", "weight", "inverse_x", "inverse_w", "grad_x", "grad_weight"),
    }
    for kernel, names in tensors.items():
        signature = dict.fromkeys(names, "*" + real)
        signature |= dict.fromkeys(("classes",) if kernel == "scale_kernel" else ("batch", "length"), "i32")
        yield "cosine_linear", kernel, signature, {"BLOCK": 1024}, {}


COSINE_LINEAR = [*cosine_linear_jobs("fp32"), *cosine_linear_jobs("fp64")]


def group_linear_job(kernel, x="fp32", weight="fp32", slots=1, cosine=True, bias=False, features="i32:16"):
    """A kernel of group_linear with the tile that its launcher takes."""
    double = "fp64" in (x, weight)
    computing = "fp64" if double else "fp32"
    kinds = {"x": x, "grad_x": x, "weight": weight, "grad_weight": weight}
    pointers = ("out", "grad_out", "bias", "cosines", "inv_x", "inv_weight")
    signature = {name: "*" + kind for name, kind in (dict.fromkeys(pointers, computing) | kinds).items()}
    signature |= dict.fromkeys(("batch", "groups", "slots", "classes"), "i32") | {"features": features}
    strides = [f"{of}_{by}_stride" for of in ("x", "grad") for by in ("batch", "group")]
    signature |= dict.fromkeys(strides, features.replace("32", "64"))
    module = "group_linear"
    if kernel in FEW_SLOTS_KERNELS:
        module = "group_linear_few_slots"
        size = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}[x]
        forward = kernel == FEW_SLOTS_KERNELS[0]
        constants = {"DOUBLE": double} | (
            few.forward_tile(slots, size) if forward else few.backward_tile(slots, double)
        )
    else:
        constants = tile(slots, kernel == "group_linear_kernel")
    constants["COSINE"] = cosine
    options = {"num_warps": constants.pop("num_warps")}
    if not bias and kernel in ("group_linear_kernel", FEW_SLOTS_KERNELS[0]):
        constants |= {"bias": None, "cosines": None}
    return module, kernel, signature, constants, options


GROUP_LINEAR_KERNELS = ("group_linear_kernel", "grad_x_kernel", "grad_weight_kernel")
FEW_SLOTS_KERNELS = ("few_slots_kernel", "few_slots_backward_kernel")
GROUP_LINEAR = [
    *(group_linear_job(kernel, "bf16", "bf16", slots=32) for kernel in GROUP_LINEAR_KERNELS),
    group_linear_job("group_linear_kernel", "bf16", "fp16", slots=16, cosine=False, features="i32"),
]
FEW_SLOTS = [
    group_linear_job(kernel, x, weight, slots=slots, bias=bias)
    for kernel in FEW_SLOTS_KERNELS
    for x, weight, bias in (("fp32", "fp32", False), ("bf16", "fp32", True), ("fp64", "fp64", False))
    for slots in (1, 2, 4, 7, 12)
] + [group_linear_job(kernel, slots=7, features="i32") for kernel in FEW_SLOTS_KERNELS]


def products_jobs(real, x):
    """The kernels around the library's products."""
    others = ["products", "products_x", "products_weight", "bias", "cosines", "inv_x", "inv_weight"]
    others += ["factors", "shrink_x", "shrink_weight"]
    kinds = dict.fromkeys(others, "*" + real) | dict.fromkeys(("x", "grad_x", "weight", "grad_weight"), "*" + x)
    kinds |= dict.fromkeys(("out", "grad_out"), "*" + x)
    strides = [f"{of}_{by}_stride" for of in ("products", "x", "grad") for by in ("batch", "group")]
    lengths, tile, flat = (dict(of) for of in (products.LENGTHS_TILE, products.TILE, {"BLOCK": products.BLOCK}))
    for constants in (lengths, tile):
        del constants["num_warps"]  # the module's
    kernels = {
        "lengths_kernel": (
            "x weight inv_x inv_weight", "batch groups features slots", ["batch_stride", "group_stride"], lengths,
        ),
        "place_kernel": (
            "products inv_x inv_weight bias out cosines", "batch groups slots classes", [], tile | {"COSINE": True},
        ),
        "factors_kernel": (
            "grad_out cosines inv_x inv_weight factors shrink_x shrink_weight", "batch groups slots classes", [],
            tile | {"COSINE": True},
        ),
        "take_kernel": (
            "products_x x shrink_x grad_x products_weight weight shrink_weight grad_weight",
            "batch groups features slots", strides, flat,
        ),
    }  # fmt: skip
    for kernel, (tensors, sizes, of_strides, constants) in kernels.items():
        signature = {name: kinds[name] for name in tensors.split()}
        signature |= dict.fromkeys(sizes.split(), "i32") | dict.fromkeys(of_strides, "i64")
        yield "group_linear_products", kernel, signature, constants, {}


PRODUCTS = [*products_jobs("fp32", "fp32"), *products_jobs("fp32", "bf16"), *products_jobs("fp64", "fp64")]


def reweight_pool_jobs(features, channels_last=False, needs_grad=True, positions=196):
    """The kernels of reweight_pool with the tiles that the launcher takes for maps of this size."""
    computing = "fp64" if features == "fp64" else "fp32"
    kinds = dict.fromkeys(("features", "out", "grad_out", "grad_features"), "*" + features)
    kinds |= dict.fromkeys(("weight", "weight_slope", "grad_weight"), "*" + computing) | {"argmax": "*i32"}
    kinds |= {"batch": "i32", "channels": "i32:16", "positions": "i32"}
    common = {"CHANNELS_LAST": channels_last, "QUADS": positions % 4 == 0}
    kernels = {
        "reweight_pool_kernel": (
            "features weight out argmax weight_slope channels positions",
            common | {"NEEDS_GRAD": needs_grad} | pool.forward_tile(positions, channels_last, needs_grad),
        ),
        "grad_features_kernel": (
            "grad_out weight argmax grad_features channels positions",
            common | pool.backward_tile(positions, channels_last),
        ),
        "grad_weight_kernel": ("grad_out weight_slope grad_weight batch channels", dict(pool.SUMS_TILE)),
    }
    for kernel, (names, constants) in kernels.items():
        options = {"num_warps": constants.pop("num_warps")}
        yield "reweight_pool", kernel, {name: kinds[name] for name in names.split()}, constants, options


REWEIGHT_POOL = [
    *reweight_pool_jobs("fp32"),
    *reweight_pool_jobs("fp32", positions=49),
    *reweight_pool_jobs("fp64", positions=324),
    *reweight_pool_jobs("bf16", channels_last=True),
    *reweight_pool_jobs("fp64"),
    *reweight_pool_jobs("fp64", channels_last=True),
    next(reweight_pool_jobs("fp16", needs_grad=False)),
]
EVERY_JOB = [*COSINE_LINEAR, *GROUP_LINEAR, *FEW_SLOTS, *PRODUCTS, *REWEIGHT_POOL]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def test_kernels_do_not_spill(compile_triton, target):
    assert_no_spills(EVERY_JOB, compile_triton, target)


def test_group_linear_of_many_slots_runs_on_tensor_cores(compile_triton):
    for job, result in zip(GROUP_LINEAR, compile_triton(GROUP_LINEAR, H100), strict=True):
        assert "tf32" in result["text"], job


def test_group_linear_of_few_slots_is_not_rounded_to_tf32(compile_triton):
    """Triton makes products that are summed into a `tl.dot` by itself, from 16 rows on."""
    for job, result in zip(FEW_SLOTS, compile_triton(FEW_SLOTS, H100), strict=True):
        assert "mma" not in result["text"], job


READS, WRITES = "ld.global.v4", "st.global.v4"
VECTORS = [
    (group_linear_job(kernel, slots=slots), moved)
    for kernel, moved in zip(FEW_SLOTS_KERNELS, ((READS,), (READS, WRITES)), strict=True)
    for slots in (1, 7)
]
VECTORS += [
    (job, moved)
    for channels_last in (False, True)
    for job, moved in zip(reweight_pool_jobs("fp32", channels_last), ((READS,), (WRITES,)), strict=False)
]


@pytest.mark.parametrize(("job", "moved"), VECTORS, ids=lambda value: value[1] if len(value) == 5 else "")
def test_memory_is_moved_16_bytes_at_a_time(compile_triton, job, moved):
    """Where features come in multiples of 16, positions in multiples of 4."""
    (result,) = compile_triton([job], H100)
    assert all(instruction in result["text"] for instruction in moved)
