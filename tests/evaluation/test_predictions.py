import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mlfast.evaluation import Predictions, multilabel_metrics, tune_thresholds


def split(rows, classes, unknown, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, classes, generator=g)
    targets = (torch.rand(rows, classes, generator=g) < 0.3 * scores).to(torch.int8)
    return scores, targets.masked_fill(torch.rand(rows, classes, generator=g) < unknown, -1)


def collected(scores, targets, known_only, sizes=(7, 1, 30, 200)):
    predictions = Predictions(scores.shape[1], known_only)
    for batch in zip(scores.split(sizes), targets.split(sizes), strict=True):
        predictions.add(*batch)
    return predictions


def same(mine, expected):
    for name, value in expected.as_dict().items():
        np.testing.assert_allclose(mine.as_dict()[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("known_only", [False, True])
def test_the_callers_buffer_may_be_used_again(known_only):
    scores, targets = split(40, 5, 0.2)
    buffer, predictions = np.empty((10, 5), np.float32), Predictions(5, known_only)
    for some_scores, some_targets in zip(scores.split(10), targets.split(10), strict=True):
        buffer[:] = some_scores
        predictions.add(buffer, some_targets)
    same(predictions.metrics(), multilabel_metrics(scores, targets))


@pytest.mark.parametrize("known_only", [False, True])
@pytest.mark.parametrize(("threshold", "message"), [(float("nan"), "got nan"), ([0.5, 0.5], r"got shape \(2,\)")])
def test_wrong_thresholds_are_named(known_only, threshold, message):
    with pytest.raises(ValueError, match=f"threshold: {message}"):
        collected(*split(238, 5, 0.1), known_only).metrics(threshold)


@pytest.mark.parametrize("known_only", [False, True])
@pytest.mark.parametrize("unknown", [0.0, 0.9])
@pytest.mark.parametrize("options", [{}, {"f1": "macro", "absent": "zero"}, {"f1": "sample", "interpolated": True}])
def test_batches_come_to_the_whole(known_only, unknown, options):
    scores, targets = split(238, 5, unknown)
    targets[:, 3] = 0
    predictions = collected(scores, targets, known_only)
    for threshold in (0.5, [0.1, 0.2, 0.3, 0.4, 0.5]):
        same(
            predictions.metrics(threshold, **options),
            multilabel_metrics(scores, targets, torch.tensor(threshold), **options),
        )
    for tuning in ({}, {"beta": 2.0}, {"min_precision": 0.5}, {"shared": True}):
        np.testing.assert_equal(
            vars(predictions.thresholds(**tuning)), vars(tune_thresholds(scores, targets, **tuning))
        )


@pytest.mark.parametrize("known_only", [False, True])
def test_nothing_yet(known_only):
    assert np.isnan(Predictions(3, known_only).metrics().mAP)
    assert Predictions(3, known_only).thresholds().defaulted == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_target_dtypes(dtype):
    scores, targets = split(20, 3, 0.0)
    predictions = Predictions(3)
    predictions.add(scores, targets.to(dtype))
    same(predictions.metrics(), multilabel_metrics(scores, targets))


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="got 3 classes, expected 4"):
        Predictions(4).add(torch.rand(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("known_only", [False, True])
@pytest.mark.parametrize(("wrong", "message"), [(-0.5, "from -0.5 to 1"), (2.25, "from 0 to 2.25")])
def test_logits_are_refused_and_leave_nothing(known_only, wrong, message):
    scores = torch.tensor([[0.0, 1.0], [0.5, wrong]])
    predictions = Predictions(2, known_only)
    with pytest.raises(ValueError, match=rf"{message}, expected 0 to 1; pass model\.probabilities"):
        predictions.add(scores, torch.ones(2, 2))
    assert predictions.num_images == 0
    predictions.add(scores[:1], torch.ones(1, 2))
    assert predictions.metrics().num_classes_evaluated == 2


@pytest.mark.parametrize("options", [{"f1": "micro"}, {"absent": "skip"}])
@pytest.mark.parametrize("known_only", [False, True])
def test_unknown_definitions_are_refused(known_only, options):
    with pytest.raises(ValueError, match="expected one of"):
        collected(*split(238, 2, 0.5), known_only).metrics(**options)


def a_process(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    scores, targets = split(101, 4, 0.5)
    share = slice(0, 40) if rank == 0 else slice(40, None)
    for known_only in (False, True):
        predictions = Predictions(4, known_only)
        predictions.add(scores[share], targets[share])
        results[rank, known_only] = predictions.gather().gather().metrics()  # a second time changes nothing
    dist.destroy_process_group()


def test_two_processes_with_uneven_shares():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(a_process, (port, results), nprocs=2)
        found = dict(results)
    assert len(found) == 4
    for metrics in found.values():
        same(metrics, multilabel_metrics(*split(101, 4, 0.5)))
