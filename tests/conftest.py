"""Fixtures that every room's tests share."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest  # noqa: E402

import mlfast  # noqa: E402

ON_GPU = ("triton", "cuda")


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request):
    """Runs the test inside each backend of this machine; skips the others with the reason."""
    state = {b.name: b for b in mlfast.backends()}[request.param]
    if not state.available:
        pytest.skip(f"backend {request.param}: {state.detail}")
    with mlfast.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    """Where tensors of this backend live."""
    return torch.device("cuda" if HAS_GPU and backend in ON_GPU else "cpu")


@pytest.fixture
def one_thread():
    """Small models gain nothing from a second thread, and lose much where another process wants its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """Fills every uninitialised tensor with NaN, so that an output a kernel forgets cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
