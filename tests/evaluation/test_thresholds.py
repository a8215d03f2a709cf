import numpy as np
import pytest
import torch
from hypothesis import given, settings
from sklearn.metrics import fbeta_score, precision_score, recall_score

from mlfast.evaluation import fold_thresholds, multilabel_metrics, tune_thresholds
from tests.evaluation.test_metrics import SCORES, TARGETS, problems


def all_candidates(scores):
    return [*np.unique(scores), np.inf]


def known(scores, targets, k):
    keep = targets[:, k] >= 0
    return scores[keep, k], targets[keep, k]


def test_worked_example():
    found = tune_thresholds(SCORES, TARGETS)
    assert found.values.tolist() == [0.7, 0.6, 0.3, 0.45]
    assert found.positives.tolist() == [2, 2, 3, 2]
    assert (found.defaulted, found.unreliable) == ([], [0, 1, 2, 3])


@settings(deadline=None, max_examples=60)
@given(problems())
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_no_threshold_is_better(beta, problem):
    scores, targets = problem
    found = tune_thresholds(scores, targets, beta=beta)
    for k in range(scores.shape[1]):
        s, t = known(scores, targets, k)
        if not (t > 0).any():
            assert k in found.defaulted
            assert found.values[k] == 0.5
            continue
        reached = [fbeta_score(t, s >= limit, beta=beta, zero_division=0) for limit in all_candidates(s)]
        assert found.reached[k] == pytest.approx(max(reached))
        assert fbeta_score(t, s >= found.values[k], beta=beta) == pytest.approx(max(reached))


@settings(deadline=None, max_examples=60)
@given(problems())
@pytest.mark.parametrize("floor", [0.4, 0.75, 1.0])
def test_most_recall_at_a_floor_of_precision(floor, problem):
    scores, targets = problem
    found = tune_thresholds(scores, targets, min_precision=floor, default=7.0)
    for k in range(scores.shape[1]):
        s, t = known(scores, targets, k)
        limits = [x for x in np.unique(s[t > 0]) if precision_score(t, s >= x, zero_division=0) >= floor - 1e-12]
        recalls = [recall_score(t, s >= limit) for limit in limits]
        if not recalls:
            assert found.values[k] == 7.0
            assert k in found.defaulted
        else:
            assert found.reached[k] == pytest.approx(max(recalls))
            assert precision_score(t, s >= found.values[k]) >= floor - 1e-12


@settings(deadline=None, max_examples=30)
@given(problems())
def test_one_threshold_for_all_maximises_the_overall_f1(problem):
    scores, targets = problem
    if not (targets > 0).any():
        return
    found = tune_thresholds(scores, targets, shared=True)
    assert len(set(found.values)) == 1
    assert len(found.values) == scores.shape[1]
    best = max(multilabel_metrics(scores, targets, float(x)).OF1 for x in np.unique(scores))
    assert pytest.approx(best) == multilabel_metrics(scores, targets, found.values).OF1


def test_a_threshold_taken_from_the_scores_is_reached_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        scores = torch.tensor([[0.1], [0.3], [0.7]]).to(dtype)
        found = tune_thresholds(scores, torch.tensor([[0], [0], [1]]))
        assert multilabel_metrics(scores, torch.tensor([[0], [0], [1]]), found.values).OF1 == 1


def test_classes_that_deserve_doubt_are_named():
    scores = np.tile(np.linspace(0, 1, 40)[:, None], 3)
    targets = np.zeros((40, 3), dtype=int)
    targets[20:, 0], targets[35:, 1] = 1, 1
    found = tune_thresholds(scores, targets)
    assert (found.defaulted, found.unreliable) == ([2], [1])
    assert found.warning(["cat", "dog", "eel"]) == (
        "the default threshold for 1 classes: eel; fewer than 10 positives for 1 classes: dog"
    )


@pytest.mark.parametrize(
    "option",
    [{"beta": 0}, {"beta": float("inf")}, {"default": float("nan")}, {"min_precision": 0}, {"min_precision": 1.5}],
)
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        tune_thresholds(SCORES, TARGETS, **option)


def test_a_precision_is_reached_exactly():
    """7 of 25 are 0.28, though 0.28 * 25 is more than 7 in floating point."""
    scores = np.linspace(1, 0.04, 25, dtype=np.float32)[:, None]
    targets = np.array([1] * 6 + [0] * 18 + [1], np.int8)[:, None]
    found = tune_thresholds(scores, targets, min_precision=0.28)
    assert found.values[0] == scores[-1, 0] and found.reached[0] == 1


def test_folded_thresholds_decide_as_tuned():
    thresholds = tune_thresholds(SCORES, TARGETS).values
    logits = torch.logit(torch.tensor(SCORES))
    folded = torch.sigmoid(fold_thresholds(logits, torch.tensor(thresholds)))
    clear = torch.tensor(thresholds != SCORES)  # equality is within rounding of either side
    assert torch.equal((folded >= 0.5)[clear], torch.tensor(thresholds <= SCORES)[clear])


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 0.3, 0.9999, 1.0])
def test_folded_thresholds_decide_alike_up_to_the_ends(threshold):
    logits = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(15.5, 17, 4001)])
    told = (logits - torch.logit(torch.tensor(threshold, dtype=torch.float64))).abs() > 1e-5
    folded = torch.sigmoid(fold_thresholds(logits, torch.tensor([threshold]))) >= 0.5
    assert torch.equal(folded[told], (torch.sigmoid(logits) >= threshold)[told])


def test_thresholds_as_tuned_are_folded():
    logits, values = torch.tensor([[0.0, 3.0]]), np.array([0.5, 0.9])
    torch.testing.assert_close(fold_thresholds(logits, values), fold_thresholds(logits, torch.from_numpy(values)))
    for wrong in (1.5, np.nan):
        with pytest.raises(ValueError, match=r"thresholds: got values outside \[0, 1\]"):
            fold_thresholds(logits, np.array([0.5, wrong]))
