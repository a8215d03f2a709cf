"""The Triton kernels of graph_attention, compiled ahead of time: no type error or spill waits for a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from mlfast.kernels import graph_attention as sparse
from mlfast.kernels import graph_attention_dense as dense
from tests.kernels.compilers import H100, TARGETS, assert_no_spills

NUMBERS = {"negative_slope": "fp64", "threshold": "i64", "scale": "fp64"}
SIZES = {"nodes": "i32", "heads": "i32", "features": "i32:16"}
SPARSE, DENSE = "graph_attention", "graph_attention_dense"


def pointers(kind, *names):
    return dict.fromkeys(names, f"*{kind}")


def tiled(value, nodes, features, forward):
    """The tile that the launcher takes, and the option of the launch."""
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}[value]
    chosen = sparse.tile(torch.empty(nodes, 1, features, dtype=dtype, device="meta"), forward)
    return chosen, {"num_warps": chosen.pop("num_warps")}


def jobs(value, computing, drops):
    """Every kernel for one type of values, as the launchers specialise it."""
    scores = pointers(computing, "score_src", "score_dst")
    rows = {"indptr": "*i64", "indices": "*i32"}
    transpose = {"indptr_t": "*i64", "indices_t": "*i32", "edges_t": "*i64"}
    drop, seed = {"DROPS": drops}, {"seed": "*i64"}
    forward = scores | rows | seed | pointers(value, "value", "out") | pointers(computing, "statistics")
    backward = scores | transpose | seed | pointers(value, "value", "grad_out", "grad_value")
    backward |= pointers(computing, "statistics", "grad_weights")
    logits = scores | rows | pointers(computing, "statistics", "grad", "grad_score_dst")
    src = {"indptr_t": "*i64", "edges_t": "*i64"} | pointers(computing, "grad", "grad_score_src")
    block = dict.fromkeys(("nodes", "rows", "first"), "i32") | NUMBERS
    weights = scores | seed | {"mask": "*u8"} | pointers(computing, "weights")
    grads = scores | seed | pointers(computing, "weights", "grad", "grad_score_dst")
    columns = pointers(computing, "grad", "grad_score_src") | dict.fromkeys(("nodes", "rows", "first"), "i32")
    scores, one_number = {"BLOCK_EDGES": 32}, {"heads": "i32", "negative_slope": "fp64"}
    found = [
        (SPARSE, "grad_logits_kernel", logits | one_number, scores, {}),
        (SPARSE, "grad_score_src_kernel", src | {"heads": "i32"}, scores, {}),
        (DENSE, "add_columns_kernel", columns, {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 8}, {"num_warps": 4}),
    ]
    for nodes, features in ((80, 1280), (9605, 1280), (601, 256), (80, 64), (9605, 64), (9605, 8)):
        tile, warps = tiled(value, nodes, features, True)
        tile |= drop | {"BLOCK_SCORES": 32}
        found.append((SPARSE, "graph_attention_kernel", forward | SIZES | NUMBERS, tile, warps))
        tile, warps = tiled(value, nodes, features, False)
        found.append((SPARSE, "grad_value_kernel", backward | SIZES | NUMBERS, tile | drop, warps))
    for nodes in (80, 9605):
        tile = dense.tile(nodes)
        warps = {"num_warps": tile.pop("num_warps")}
        found.append((DENSE, "dense_weights_kernel", weights | block, tile | drop | {"HAS_MASK": True}, warps))
        found.append((DENSE, "dense_grad_kernel", grads | block, tile | drop, warps))
    return found


def of_vectors(found):
    """Those that read or write values; the others know their computing type alone."""
    return [job for job in found if job[1] in ("graph_attention_kernel", "grad_value_kernel")]


def complete_attention_jobs(value):
    """The kernels of _graph_attention_complete for values of one type."""
    f64 = dict.fromkeys(
        ("weights", "sums", "sums_rows", "sums_sources", "sums_delta", "dots", "normalised", "parts"), "*fp64"
    )
    pointers = f64 | dict.fromkeys(("x", "value", "out", "grad_out", "grad_value"), "*" + value)
    pointers |= {"sorted_order": "*i64", "order": "*i32", "grad_src": "*" + value, "grad_dst": "*" + value}
    computing = "*fp64" if value == "fp64" else "*fp32"
    pointers |= dict.fromkeys(("score_src", "score_dst", "top"), computing)
    sizes = dict.fromkeys(("nodes", "heads", "columns"), "i32")
    scan = {"heads": "i32", "chunks": "i32", "width": "i32"}
    chunk, tile = {"CHUNK": 64}, {"CHUNK": 64, "BLOCK": 8}
    names = {
        "weights_kernel": (
            "sorted_order score_src score_dst top order weights",
            {"negative_slope": "fp64", "nodes": "i32", "heads": "i32"},
            {"BLOCK": 256},
        ),
        "chunk_sums_kernel": ("x order weights sums", sizes, {"OF_SOURCES": True} | tile),
        "scan_kernel": ("sums", scan, {"SCANNED": 64, "BLOCK": 8}),
        "collect_kernel": ("value order weights sums out normalised", sizes | {"span": "i32"}, tile),
        "collect_backward_kernel": (
            "grad_out value order weights sums_rows sums_sources grad_value parts",
            sizes | {"span": "i32"},
            {"NEEDS_VALUE": True} | tile,
        ),
        "dots_kernel": (
            "order weights parts dots sums_delta",
            {"nodes": "i32", "heads": "i32", "programs": "i32"},
            chunk,
        ),
        "grad_scores_kernel": (
            "order weights sums_sources dots sums_delta grad_src grad_dst",
            {"slope": "fp64"} | sizes,
            chunk,
        ),
    }
    return [
        (
            COMPLETE_BACKWARD if kernel in BACKWARD else COMPLETE,
            kernel,
            {name: pointers[name] for name in tensors.split()} | numbers,
            constants,
            {},
        )
        for kernel, (tensors, numbers, constants) in names.items()
    ]


COMPLETE, COMPLETE_BACKWARD = "graph_attention_complete", "graph_attention_complete_backward"
BACKWARD = ("collect_backward_kernel", "dots_kernel", "grad_scores_kernel")
COMPLETE_JOBS = [job for value in ("fp32", "bf16", "fp64") for job in complete_attention_jobs(value)]
# Values of 16 bits reach two kernels of the sparse route; the dense one computes in float32 all the same.
GRAPH_JOBS = [*jobs("fp32", "fp32", True), *of_vectors(jobs("bf16", "fp32", False))]
DOUBLE_JOBS = jobs("fp64", "fp64", True)
EVERY_JOB = [*GRAPH_JOBS, *DOUBLE_JOBS, *COMPLETE_JOBS]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target[0]}-{target[1]}")
def test_kernels_do_not_spill(compile_triton, target):
    assert_no_spills(EVERY_JOB, compile_triton, target)


def test_values_are_moved_16_bytes_at_a_time(compile_triton):
    wide = [job for job in of_vectors(jobs("fp32", "fp32", False)) if job[3]["BLOCK_FEATURES"] >= 256]
    for job, result in zip(wide, compile_triton(wide, H100), strict=True):
        assert "ld.global.v4" in result["text"] and "st.global.v4" in result["text"], job
