"""The Triton kernels of graph_attention, compiled ahead of time for GPUs: no type error or spill waits for one."""

from tests.kernels.test_compile_gpu import H100, OTHER_TARGETS, compile_triton, resources  # noqa: F401

NUMBERS = {"negative_slope": "fp64", "threshold": "i64", "scale": "fp64"}
SIZES = dict.fromkeys(("nodes", "heads", "features"), "i32")
SPARSE, DENSE = "graph_attention", "graph_attention_dense"


def pointers(kind, *names):
    return dict.fromkeys(names, f"*{kind}")


def jobs(value, computing, drops):
    """Every kernel for one type of values, as the launchers specialise it."""
    scores = pointers(computing, "score_src", "score_dst")
    rows = {"indptr": "*i64", "indices": "*i32"}
    transpose = {"indptr_t": "*i64", "indices_t": "*i32", "edges_t": "*i64"}
    tile, seed = {"DROPS": drops, "BLOCK_EDGES": 16, "BLOCK_FEATURES": 256}, {"seed": "*i64"}
    forward = scores | rows | seed | pointers(value, "value", "out") | pointers(computing, "statistics")
    backward = scores | transpose | seed | pointers(value, "value", "grad_out", "grad_value")
    backward |= pointers(computing, "statistics", "grad_weights")
    logits = scores | rows | pointers(computing, "statistics", "grad", "grad_score_dst")
    src = {"indptr_t": "*i64", "edges_t": "*i64"} | pointers(computing, "grad", "grad_score_src")
    block = dict.fromkeys(("nodes", "rows", "first"), "i32") | NUMBERS
    weights = scores | seed | {"mask": "*u8"} | pointers(computing, "weights")
    grads = scores | seed | pointers(computing, "weights", "grad", "grad_score_dst")
    columns = pointers(computing, "grad", "grad_score_src") | {"nodes": "i32", "rows": "i32"}
    return [
        (SPARSE, "graph_attention_kernel", forward | SIZES | NUMBERS, tile, False),
        (SPARSE, "grad_value_kernel", backward | SIZES | NUMBERS, tile, False),
        (SPARSE, "grad_logits_kernel", logits | {"heads": "i32", "negative_slope": "fp64"}, {"BLOCK_EDGES": 16}, False),
        (SPARSE, "grad_score_src_kernel", src | {"heads": "i32"}, {"BLOCK_EDGES": 16}, False),
        (DENSE, "dense_weights_kernel", weights | block, {"HAS_MASK": True, "DROPS": drops, "BLOCK": 512}, False),
        (DENSE, "dense_grad_kernel", grads | block, {"DROPS": drops, "BLOCK": 512}, False),
        (DENSE, "add_columns_kernel", columns, {"BLOCK": 128}, False),
    ]


ALL = jobs("fp32", "fp32", True) + jobs("bf16", "fp32", False)


def test_kernels_do_not_spill(compile_triton):  # noqa: F811
    for job, result in zip(ALL, compile_triton(ALL, H100), strict=True):
        used = resources(result["usage"])
        assert used["STACK"] == used["LOCAL"] == 0, (job, used)


def test_kernels_compile_for_float64_and_an_older_target(compile_triton):  # noqa: F811
    assert len(compile_triton(jobs("fp64", "fp64", True), OTHER_TARGETS[0])) == 7
