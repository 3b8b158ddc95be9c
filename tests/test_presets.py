"""Budgets to begin with."""

import pytest

from flashsfa.budget import query_features, require_budget
from flashsfa.presets import PRESETS, default_budget, default_key_bytes, larger_budgets


def test_the_measured_head_size_and_shares_of_others():
    assert [(x.dense_dims, x.topk) for x in map(default_budget, (64, 128, 32))] == [(22, 12), (44, 24), (11, 6)]


@pytest.mark.parametrize("head_dim", [*range(1, 20), 64, 80, 96, 128, 192, 256])
def test_every_head_size_has_a_budget_that_fits(head_dim):
    for preset in (default_budget(head_dim), *larger_budgets(0, 1, head_dim)):
        require_budget(preset.topk, head_dim, preset.dense_dims)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 48, 64, 80, 96, 128, 192, 256])
def test_the_preset_for_where_nothing_is_said_is_what_is_taken_then(head_dim):
    assert PRESETS["balanced"].key_bytes_of(head_dim) == default_key_bytes(head_dim)


def test_key_bytes_of_presets_at_both_head_sizes():
    """`small` as it was measured at either; no more than a byte for each feature of a narrow head."""
    found = {name: [x.key_bytes_of(d) for d in (8, 64, 128)] for name, x in PRESETS.items() if x.key_bytes}
    assert found == {"near-lossless": [6, 52, 104], "balanced": [8, 36, 68], "small": [8, 32, 48]}


def test_larger_budgets_take_more_bytes_and_lose_less():
    larger = larger_budgets(22, 12, 64)
    assert [(x.dense_dims, x.topk) for x in larger] == [(32, 8), (28, 12)]
    assert [x.key_bytes for x in larger] == [88, 92]
    assert all(x.loss < default_budget(64).loss for x in larger)
    assert larger_budgets(60, 4, 64) == []


def test_dense_queries_keep_all():
    assert (query_features("dense", 64), query_features(8, 64)) == (64, 8)
