"""What only a GPU can settle: CUDA graphs, streams, launches, waiting, and tensors of real sizes."""

import itertools

import pytest
import torch

import mlfast
from mlfast import functional as F
from tests.ops.policy import assert_bit_equal, assert_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LOSSES = {"aam_loss": F.aam_loss, "asymmetric_loss": F.asymmetric_loss}


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    """Runs the test inside each backend of a GPU."""
    with mlfast.use_backend(request.param):
        yield request.param


def random(*shape, seed=0):
    """Uniform in [-1, 1]."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.rand(shape, generator=generator, device="cuda") * 2 - 1


def labels(rows, classes, seed=0):
    """About three labels per image."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.rand(rows, classes, generator=generator, device="cuda") < 3 / classes


def graph_of(nodes, neighbours):
    edges = torch.randint(nodes, (2, nodes * neighbours), generator=torch.Generator().manual_seed(0))
    return mlfast.Graph.from_edges(edges, nodes).to("cuda")


class Case:
    """A call of an op, and the shapes of the tensors that need a gradient."""

    def __init__(self, call, *shapes):
        self.call, self.shapes = call, shapes

    def leaves(self, seed=0):
        return [random(*shape, seed=seed + 7 * i) for i, shape in enumerate(self.shapes)]

    def results(self, leaves):
        """The output, and its gradients for an uneven incoming gradient."""
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = self.call(*leaves)
        incoming = torch.linspace(0.5, 2, max(out.numel(), 1), dtype=out.dtype, device="cuda").view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, incoming)]


def cases(large):
    """Small ones fit a few programs; the large ones are of the paper's sizes."""
    rows, classes = (256, 9605) if large else (6, 81)
    batch, groups, length, slots, known = (32, 100, 768, 97, 9605) if large else (5, 7, 40, 3, 20)
    images, channels, side = (84, 1280, 14) if large else (3, 10, 5)
    nodes, features = (2000, 256) if large else (70, 24)
    target, graph = labels(rows, classes), graph_of(nodes, 10 if large else 3)
    mask = graph.to_dense() > 0
    attention = (nodes, 1, features), (nodes, 1), (nodes, 1)
    return {
        "aam_loss": Case(lambda x: F.aam_loss(x, target), (rows, classes)),
        "asymmetric_loss": Case(lambda x: F.asymmetric_loss(x, target), (rows, classes)),
        "cosine_linear": Case(F.cosine_linear, (batch, length), (classes, length)),
        "group_linear": Case(
            lambda x, w: F.group_linear(x, w, num_classes=known, cosine=True),
            (batch, groups, length),
            (groups, length, slots),
        ),
        "group_linear, one slot": Case(
            lambda x, w: F.group_linear(x, w, num_classes=groups, cosine=True),
            (batch, groups, length),
            (groups, length, 1),
        ),
        "reweight_pool": Case(F.reweight_pool, (images, channels, side, side), (channels,)),
        "reweight_pool, channels_last": Case(
            lambda x, w: F.reweight_pool(x.contiguous(memory_format=torch.channels_last), w),
            (images, channels, side, side),
            (channels,),
        ),
        "graph_attention": Case(F.graph_attention, *attention),
        "graph_attention, Graph": Case(lambda *tensors: F.graph_attention(*tensors, graph), *attention),
        "graph_attention, mask": Case(lambda *tensors: F.graph_attention(*tensors, mask), *attention),
    }


OPS = (
    "aam_loss", "asymmetric_loss", "cosine_linear", "group_linear", "group_linear, one slot", "reweight_pool",
    "reweight_pool, channels_last", "graph_attention", "graph_attention, Graph", "graph_attention, mask",
)  # fmt: skip


@pytest.fixture(params=OPS)
def op(request):
    """The name of a case, on the backend that its op takes by itself on a GPU."""
    return request.param


# ------------------------------------------------------------------------------------------------------- real sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_sizes_against_float64(op, dtype):
    case = cases(large=True)[op]
    leaves = [leaf.to(dtype) for leaf in case.leaves()]
    got = case.results(leaves)
    with mlfast.use_backend("reference"):
        plain = case.results(leaves)
        truth = case.results([leaf.double() for leaf in leaves])
    for i, (mine, theirs, exact) in enumerate(zip(got, plain, truth, strict=True)):
        assert_error(f"{op}, result {i}", mine.double(), theirs.double(), exact, mine.dtype)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_of_real_sizes_on_either_backend(gpu_backend, loss, dtype):
    case = cases(large=True)[loss]
    leaves = [leaf.to(dtype) for leaf in case.leaves()]
    got = case.results(leaves)
    with mlfast.use_backend("reference"):
        plain, truth = case.results(leaves), case.results([leaf.double() for leaf in leaves])
    for i, (mine, theirs, exact) in enumerate(zip(got, plain, truth, strict=True)):
        assert_error(f"{loss}, result {i}", mine.double(), theirs.double(), exact, mine.dtype)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with gradient"])
def test_more_than_two_to_the_31_elements(gpu_backend, backward):
    rows, classes, last = 2**15 + 16, 2**16, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    scores = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1)
    target = torch.zeros(rows, classes, dtype=torch.int8, device="cuda")
    target[::3, 5] = 1
    scores.requires_grad_(backward)
    loss = F.aam_loss(scores, target)
    parts = [
        F.aam_loss(s, t) for s, t in zip(scores.detach().split(4096), target.split(4096), strict=True)
    ]  # each has less than 2^31
    assert loss.item() == pytest.approx(sum(part.double().item() for part in parts), rel=1e-6)
    if backward:
        (grad,) = torch.autograd.grad(loss, scores)
        end = scores.detach()[-last:].requires_grad_()
        (expected,) = torch.autograd.grad(F.aam_loss(end, target[-last:]), end)
        assert torch.equal(grad[-last:], expected)


def test_pooling_more_than_two_to_the_31_elements():
    features = torch.empty(2**15 + 16, 256, 16, 16, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1)
    weight = random(256)
    out = F.reweight_pool(features, weight)
    torch.testing.assert_close(out[-3:], F.reweight_pool(features[-3:].clone(), weight), rtol=0, atol=0)


# ------------------------------------------------------------------------------------- graphs, compilers, and streams


def test_replayed_in_a_cuda_graph(op):
    case = cases(large=False)[op]
    static = case.leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.results(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.results(static)
    for seed in (1, 2, 2):
        fresh = case.leaves(seed)
        for leaf, new in zip(static, fresh, strict=True):
            leaf.copy_(new)
        graph.replay()
        assert_bit_equal([captured, case.results(fresh)])


def test_compiled(op):
    torch._dynamo.reset()
    case = cases(large=False)[op]
    compiled = Case(torch.compile(case.call, fullgraph=True), *case.shapes)
    for seed in (0, 1):
        leaves = case.leaves(seed)
        torch.testing.assert_close(compiled.results(leaves), case.results(leaves))


@pytest.mark.parametrize("op", ["aam_loss", "group_linear", "graph_attention"])
def test_compiled_into_cuda_graphs(op):
    torch._dynamo.reset()
    case = cases(large=False)[op]
    compiled = Case(torch.compile(case.call, fullgraph=True, mode="reduce-overhead"), *case.shapes)
    for seed in range(5):
        leaves = case.leaves(seed)
        torch.compiler.cudagraph_mark_step_begin()
        got = [tensor.clone() for tensor in compiled.results(leaves)]
        torch.testing.assert_close(got, case.results(leaves))


def test_a_graph_of_a_tenth_of_all_pairs_keeps_its_mask():
    sparse, dense = graph_of(70, 3), graph_of(70, 20)
    assert sparse.mask is None
    assert dense.to("cpu").mask is None
    tensors = cases(large=False)["graph_attention"].leaves()
    with mlfast.use_backend("reference"):
        expected = F.graph_attention(*tensors, dense.to_dense())
    torch.testing.assert_close(F.graph_attention(*tensors, dense), expected)


def test_nothing_waits_for_the_gpu(op):
    case = cases(large=False)[op]
    leaves = case.leaves()
    case.results(leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.results(leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bit_equal_over_repeats(op):
    case = cases(large=True)[op]
    leaves = case.leaves()
    first = case.results(leaves)
    for _ in range(10):
        assert_bit_equal([case.results(leaves), first])


def test_streams_do_not_share_a_workspace(gpu_backend):
    case = cases(large=True)["aam_loss"]
    inputs = [case.leaves(seed) for seed in (1, 2)]
    expected = [case.results(leaves) for leaves in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got = {0: [], 1: []}
    for _, (i, stream) in itertools.product(range(10), enumerate(streams)):
        with torch.cuda.stream(stream):
            got[i].append(case.results(inputs[i]))
    torch.cuda.synchronize()
    for i, results in got.items():
        assert_bit_equal([expected[i], *results])


def test_on_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case = cases(large=False)["group_linear"]
    leaves = case.leaves()
    there = [leaf.to("cuda:1") for leaf in leaves]
    torch.testing.assert_close(case.call(*there).cpu(), case.call(*leaves).cpu(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ launches and memory


def kernels_of(run):
    """The names of the kernels that a call launches."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith(("Memset", "Memcpy"))]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_one_launch(gpu_backend, loss):
    scores, target = random(64, 80).requires_grad_(), labels(64, 80)
    assert len(kernels_of(lambda: LOSSES[loss](scores, target))) == 1
    names = kernels_of(lambda: torch.autograd.grad(LOSSES[loss](scores, target), scores))
    assert len([name for name in names if "loss_kernel" in name or "scale" in name]) == 2
    assert len(names) == 3, names  # and PyTorch's own, which makes the incoming gradient 1


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_a_loss_is_its_gradient(gpu_backend, loss):
    scores, target = random(256, 9605).requires_grad_(), labels(256, 9605)
    torch.autograd.grad(LOSSES[loss](scores, target), scores)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(LOSSES[loss](scores, target), scores)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= scores.nbytes + 2**20


# ------------------------------------------------------------------------------------------------- reduced precision


def test_logits_far_out_in_float16(gpu_backend):
    logits = torch.tensor([[80.0, -80.0, 80.0, -80.0]], dtype=torch.float16, device="cuda").requires_grad_()
    target = torch.tensor([[1, 1, 0, 0]], device="cuda")
    loss = F.asymmetric_loss(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_with_a_scaled_loss(gpu_backend, loss, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 80).to("cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    before = layer.weight.detach().clone()
    for _ in range(4):  # a scale that is too large at first skips a step
        with torch.autocast("cuda", dtype):
            scores = layer(random(16, 64)).tanh()
            value = LOSSES[loss](scores, labels(16, 80))
        assert value.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    assert layer.weight.isfinite().all()
    assert not torch.equal(layer.weight, before)
