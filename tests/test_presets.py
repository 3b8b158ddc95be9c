"""Budgets to begin with."""

import pytest

from flashsfa.budget import query_features, require_budget
from flashsfa.presets import default_budget, larger_budgets


def test_the_measured_head_size_and_shares_of_others():
    assert [(x.dense_dims, x.topk) for x in map(default_budget, (64, 128, 32))] == [(22, 12), (44, 24), (11, 6)]


@pytest.mark.parametrize("head_dim", [*range(1, 20), 64, 80, 96, 128, 192, 256])
def test_every_head_size_has_a_budget_that_fits(head_dim):
    for preset in (default_budget(head_dim), *larger_budgets(0, 1, head_dim)):
        require_budget(preset.topk, head_dim, preset.dense_dims)


def test_larger_budgets_take_more_bytes_and_lose_less():
    larger = larger_budgets(22, 12, 64)
    assert [(x.dense_dims, x.topk) for x in larger] == [(32, 8), (28, 12)]
    assert [x.key_bytes for x in larger] == [88, 92]
    assert all(x.loss < default_budget(64).loss for x in larger)
    assert larger_budgets(60, 4, 64) == []


def test_dense_queries_keep_all():
    assert (query_features("dense", 64), query_features(8, 64)) == (64, 8)
