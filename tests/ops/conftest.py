"""What the tests of kernels share."""

import pytest

from flashsfa.ops.nvrtc import cuda


@pytest.fixture
def nvrtc(tmp_path, monkeypatch):
    """Sources are compiled, and none of them was before; skips where there is no NVRTC."""
    try:
        cuda.nvrtc_version()
    except cuda.CompilationError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("FLASHSFA_CACHE", str(tmp_path))
