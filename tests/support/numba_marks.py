"""Marks of tests of the kernels for the CPU: `pytestmark = NUMBA`."""

import pytest

from flashsfa.ops.cpu import threads

NUMBA = [
    pytest.mark.cpu,
    pytest.mark.skipif(not threads.is_available(), reason="needs numba: pip install 'flashsfa[cpu]'"),
]
