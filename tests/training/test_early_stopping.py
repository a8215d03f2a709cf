"""Early stopping as in the paper's released code: against a transcript of its rule, and by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfast.training.early_stopping import EarlyStopping


def stops_at(scores, patience, warmup=0):
    stopping = EarlyStopping(patience)
    for epoch, score in enumerate(scores):
        if stopping.should_stop(score, warmed_up=epoch >= warmup):
            return epoch
    return None


def test_bad_epochs_in_a_row_stop():
    assert stops_at([0.5, 0.3, 0.3, 0.3], patience=3) == 3


def test_the_score_is_held_against_the_smoothed_one_not_the_best():
    # After 0.5 the smoothed score is 0.4: 0.45 is below the best, and good.
    assert stops_at([0.5, 0.45, 0.3, 0.45, 0.3, 0.3], patience=2) == 5


def test_bad_epochs_of_the_warmup_change_nothing():
    assert stops_at([0.5, 0.1, 0.1, 0.1, 0.1], patience=2, warmup=4) is None
    assert stops_at([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], patience=2, warmup=4) == 5


def test_a_perfect_score_stops_at_once():
    assert stops_at([0.9, 0.99997], patience=5) == 1


def test_the_state_goes_on():
    stopping = EarlyStopping(2)
    for score in (0.5, 0.2):
        stopping.should_stop(score, True)
    other = EarlyStopping(2)
    other.load_state_dict(stopping.state_dict())
    assert other.should_stop(0.2, True)


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 4), st.integers(0, 6))
def test_the_rule_word_for_word(scores, patience, warmup):
    smooth, wait, expected = 0.0, 0, None
    for epoch, score in enumerate(scores):
        current = round(score, 4)
        if abs(current - 1) < 1e-4:
            expected = epoch
            break
        bad = current <= smooth
        if bad and epoch >= warmup:
            wait += 1
            if wait >= patience:
                expected = epoch
                break
        if not bad:
            smooth = 0.8 * score + 0.2 * smooth
            wait = 0
    assert stops_at(scores, patience, warmup) == expected


@pytest.mark.parametrize("patience", [1, 5])
def test_a_rising_score_never_stops(patience):
    assert stops_at([i / 100 for i in range(1, 99)], patience) is None
