"""Every test starts from one seed, and unwritten memory is NaN; GPU tests are skipped without a GPU."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist runs tests side by side


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills torch.empty and its kin with NaN (integers: their maximum) in deterministic mode."""
    torch.manual_seed(0)
    # On CUDA some fused backwards have no deterministic form: warn, but still poison.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
