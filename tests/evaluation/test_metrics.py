# ruff: noqa: SIM300 - it takes m.CP for a constant

import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from mlfast.evaluation import Predictions, average_precision, columns, metrics, multilabel_metrics
from mlfast.torchvision_compat import import_torchvision

SCORES = np.array(
    [
        [0.9, 0.2, 0.6, 0.1],
        [0.4, 0.8, 0.55, 0.3],
        [0.7, 0.6, 0.1, 0.9],
        [0.2, 0.1, 0.3, 0.45],
        [0.55, 0.35, 0.8, 0.05],
    ]
)
TARGETS = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0]])


def naive_ap(scores, targets):
    """The definition, word for word."""
    result = []
    for s, t in zip(scores.T, targets.T, strict=True):
        ratios = [(s[t > 0] >= x).sum() / (s[t >= 0] >= x).sum() for x in s[t > 0]]
        result.append(np.mean(ratios) if ratios else np.nan)
    return np.array(result)


def ap_by_torch(scores, targets):
    """The path that runs on a GPU, on the CPU."""
    return metrics._ap_of_rows_torch(torch.tensor(scores).t().contiguous(), torch.tensor(targets).t()).numpy()


@st.composite
def problems(draw, unknowns=True):
    rows, classes = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Few different scores: almost everything is a tie.
    scores = rng.integers(0, draw(st.integers(1, 12)), (rows, classes)) / 4 - 1
    return scores, rng.choice([-1, 0, 1] if unknowns else [0, 1], (rows, classes))


def test_worked_example():
    m = multilabel_metrics(SCORES, TARGETS)
    np.testing.assert_allclose(m.per_class_ap, [1, 1, 11 / 12, 1])
    assert m.mAP == pytest.approx(0.9791666667)
    assert m.OP == m.OR == m.OF1 == pytest.approx(7 / 9)
    assert (m.CP, m.CR, m.CF1) == pytest.approx((0.8333333333, 0.7916666667, 0.8119658120))
    assert m.num_classes_evaluated == 4


def test_class_without_positives_is_left_out_of_every_class_mean():
    targets = TARGETS.copy()
    targets[:, 3] = 0
    m = multilabel_metrics(SCORES, targets)
    assert np.isnan(m.per_class_ap[3])
    assert m.mAP == pytest.approx((1 + 1 + 11 / 12) / 3)
    assert m.num_classes_evaluated == 3
    whole = multilabel_metrics(SCORES[:, :3], TARGETS[:, :3])
    assert (m.CP, m.CR, m.CF1) == (whole.CP, whole.CR, whole.CF1)
    # The overall numbers do count its false positive.
    assert m.OP < whole.OP


@settings(deadline=None)
@given(problems())
def test_ap_with_ties_and_unknowns_is_the_definition(problem):
    scores, targets = problem
    expected = naive_ap(scores, targets)
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=1e-12)
    np.testing.assert_allclose(ap_by_torch(scores, targets), expected, rtol=1e-12)


@settings(deadline=None)
@given(problems(unknowns=False))
def test_ap_equals_sklearn(problem):
    scores, targets = problem
    for k, ap in enumerate(average_precision(scores, targets)):
        if targets[:, k].any():
            assert ap == pytest.approx(average_precision_score(targets[:, k], scores[:, k]), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(problems(unknowns=False), st.sampled_from([-1.0, -0.25, 0.0, 0.5]))
def test_precision_recall_f1_equal_sklearn(problem, threshold):
    scores, targets = problem
    m = multilabel_metrics(scores, targets, threshold)
    guess = scores >= threshold
    if not targets.any():
        assert np.isnan([m.mAP, m.OP, m.OR, m.OF1, m.CP, m.CR, m.CF1]).all()
        return
    micro = precision_recall_fscore_support(targets.ravel(), guess.ravel(), average="binary", zero_division=0)
    assert (m.OP, m.OR, m.OF1) == pytest.approx(micro[:3])
    has = targets.any(axis=0)
    classes = zip(targets[:, has].T, guess[:, has].T, strict=True)
    each = [precision_recall_fscore_support(t, g, average="binary", zero_division=0)[:2] for t, g in classes]
    cp, cr = np.mean(each, axis=0)
    assert (m.CP, m.CR) == pytest.approx((cp, cr))
    assert m.CF1 == pytest.approx(2 * cp * cr / (cp + cr) if cp + cr else 0)


@settings(deadline=None)
@given(problems())
def test_an_unknown_entry_counts_nowhere(problem):
    scores, targets = problem
    a = multilabel_metrics(scores, targets, 0.0).as_dict()
    b = multilabel_metrics(np.where(targets < 0, 99.0, scores), targets, 0.0).as_dict()
    np.testing.assert_equal(a, b)


def test_ap_equals_torchmetrics():
    try:
        import_torchvision()
        module = importlib.import_module("torchmetrics.functional.classification")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchmetrics does not import here: {error}")
    torch.manual_seed(0)
    scores, targets = torch.rand(200, 7).mul(20).round() / 20, (torch.rand(200, 7) < 0.2).int()
    targets[torch.rand(200, 7) < 0.1] = -1
    expected = module.multilabel_average_precision(scores, targets, num_labels=7, average=None, ignore_index=-1)
    torch.testing.assert_close(average_precision(scores, targets).float(), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("target_dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float32])
def test_dtypes_and_devices(device, dtype, target_dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scores = torch.tensor(SCORES * 20 - 10).to(device, dtype)
    targets = torch.tensor(TARGETS).to(device, target_dtype)
    ap = average_precision(scores.requires_grad_(dtype.is_floating_point), targets)
    assert (ap.dtype, ap.device, ap.requires_grad) == (torch.float64, scores.device, False)
    np.testing.assert_allclose(ap.cpu(), naive_ap(scores.detach().double().cpu().numpy(), TARGETS))
    assert multilabel_metrics(scores, targets, 0.0).OF1 == pytest.approx(7 / 9)


def test_infinite_scores_and_strided_read_only_arrays():
    scores = SCORES.copy()
    scores[0, 0], scores[3, 2] = np.inf, -np.inf
    expected = naive_ap(scores, TARGETS)
    reverse, targets = scores[::-1], TARGETS[::-1]
    reverse.flags.writeable = False
    np.testing.assert_allclose(average_precision(reverse, targets), expected)
    np.testing.assert_allclose(ap_by_torch(scores, TARGETS), expected)
    np.testing.assert_allclose(average_precision(torch.tensor(scores).t().contiguous().t(), TARGETS), expected)


def test_column_blocks_change_nothing(monkeypatch):
    whole = average_precision(SCORES, TARGETS)
    monkeypatch.setattr(columns, "BLOCK_COLUMNS", 3)
    monkeypatch.setattr(columns, "TILE_ROWS", 2)
    np.testing.assert_array_equal(average_precision(SCORES, TARGETS), whole)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_evaluate_is_nan(rows):
    m = multilabel_metrics(torch.rand(rows, 4), torch.full((rows, 4), -1))
    assert np.isnan([m.mAP, m.OP, m.OR, m.OF1, m.CP, m.CR, m.CF1, *m.per_class_ap]).all()
    assert m.num_classes_evaluated == 0


def test_threshold_is_reached_by_equality_in_the_dtype_of_the_scores():
    scores = torch.tensor([[0.7], [0.3]])
    targets = torch.tensor([[1], [1]])
    # 0.7 in float32 is below 0.7 in float64.
    for threshold in (0.7, [0.7], np.array([0.7]), torch.tensor([0.7], dtype=torch.float64)):
        assert multilabel_metrics(scores, targets, threshold).OR == 0.5


def test_threshold_per_class():
    scores, targets = torch.tensor([[0.6, 0.6]]), torch.tensor([[1, 1]])
    assert multilabel_metrics(scores, targets, [0.5, 0.7]).CR == 0.5


def test_never_predicted_class_has_precision_zero():
    m = multilabel_metrics(torch.tensor([[0.9, 0.1]]), torch.tensor([[1, 1]]))
    assert (m.CP, m.CR, m.OP, m.OR) == (0.5, 0.5, 1.0, 0.5)
    none = multilabel_metrics(torch.tensor([[0.1]]), torch.tensor([[1]]))
    assert (none.CF1, none.OF1) == (0.0, 0.0)


def test_as_dict_is_json():
    d = multilabel_metrics(SCORES, TARGETS).as_dict()
    assert json.loads(json.dumps(d)) == d
    assert list(d) == ["mAP", "per_class_ap", "OP", "OR", "OF1", "CP", "CR", "CF1", "num_classes_evaluated"]


GOOD = torch.rand(4, 3)
HARD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD[0], HARD[0]), r"probabilities: got shape \(3,\), expected \[images, classes\]"),
        ((GOOD, HARD[:3]), r"targets: got shape \(3, 3\), expected \(4, 3\)"),
        ((GOOD / 0 * 0, HARD), r"probabilities: got 12 nan"),
        ((GOOD, HARD + 0.5), r"targets: got values above 0 that are not 1"),
        ((GOOD, HARD * torch.nan), r"targets: .*nan"),
        ((GOOD, HARD, [0.5, 0.5]), r"threshold: got shape \(2,\), expected a number or \[3\]"),
        ((GOOD, HARD, float("nan")), r"threshold: got nan"),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(*arguments)


def test_lists_are_refused():
    with pytest.raises(TypeError, match="scores: got list"):
        average_precision([[0.1]], HARD)


def test_a_mask_is_not_lost_and_imaginary_parts_neither():
    with pytest.raises(TypeError, match=r"targets: got a masked array.*\.filled\(-1\)"):
        average_precision(GOOD, np.ma.array(HARD.numpy(), mask=HARD.numpy() == 0))
    with pytest.raises(TypeError, match=r"scores: got torch\.complex64, expected real numbers"):
        average_precision(GOOD + 0j, HARD)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_targets_of_wide_unsigned_integers_are_read_as_signed(dtype):
    scores, targets = torch.rand(4, 3), torch.eye(4)[:, :3].numpy().astype(dtype)
    unknown = np.where(np.arange(12).reshape(4, 3) % 5 == 1, -1, targets.astype("int64"))
    expected = multilabel_metrics(scores, unknown)
    assert multilabel_metrics(scores, unknown.astype(dtype)).as_dict() == expected.as_dict()
    with pytest.raises(ValueError, match="targets: got values above 0 that are not 1"):
        multilabel_metrics(scores, targets * np.array(2, dtype))


# --------------------------------------------------------------------------- what others mean by the same names


def test_three_meanings_of_cf1():
    assert multilabel_metrics(SCORES, TARGETS, f1="macro").CF1 == pytest.approx(0.7833333333)
    sample = multilabel_metrics(SCORES, TARGETS, f1="sample")
    assert (sample.CP, sample.CR, sample.CF1) == pytest.approx((0.6, 0.8, 0.6666666667))


def test_a_class_without_positives_can_count_as_zero():
    targets = TARGETS.copy()
    targets[:, 3] = 0
    assert multilabel_metrics(SCORES, targets, absent="zero").mAP == pytest.approx(0.7291666667)


@settings(deadline=None)
@given(problems())
def test_interpolated_ap_is_the_area_under_the_envelope(problem):
    scores, targets = problem
    expected = []
    for s, t in zip(scores.T, targets.T, strict=True):
        s, positive = s[t >= 0], t[t >= 0] > 0
        limits = np.unique(s)
        recall = [(s[positive] >= x).sum() / max(positive.sum(), 1) for x in limits]
        precision = [positive[s >= x].mean() for x in limits]
        steps = sorted(zip(recall, precision, strict=True))
        area, before = 0.0, 0.0
        for r, _ in steps:
            area += (r - before) * max(p for q, p in steps if q >= r)
            before = r
        expected.append(area if positive.any() else np.nan)
    np.testing.assert_allclose(average_precision(scores, targets, interpolated=True), expected, rtol=1e-12)


def test_an_image_of_which_nothing_is_known_counts_nowhere():
    scores, targets = torch.tensor([[0.9], [0.9]]), torch.tensor([[1], [-1]])
    assert multilabel_metrics(scores, targets, f1="sample").CF1 == 1
    known = Predictions(1, known_only=True)
    known.add(scores, targets)
    assert known.metrics(f1="sample").CF1 == 1


def test_in_uint8_255_is_unknown():
    scores, targets = torch.rand(6, 2), torch.tensor([[1, 0], [0, -1], [-1, 1], [1, 1], [0, 0], [1, 0]])
    assert (
        multilabel_metrics(scores, targets.to(torch.uint8)).as_dict() == multilabel_metrics(scores, targets).as_dict()
    )
    with pytest.raises(ValueError, match="above 0 that are not 1"):
        multilabel_metrics(scores, 2 * (targets > 0).to(torch.uint8))
