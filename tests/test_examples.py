"""The examples run as they are written."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_generating_after_a_long_context():
    dense, sparse, last = run("generate_long_context.py", "--context", "300", "--tokens", "4").splitlines()
    assert dense.startswith("dense  KV cache")
    assert sparse.startswith("sparse KV cache")
    assert last == "the sparse cache takes 36% less"  # float32: 1024 bytes a token and head, and 16·4 + 16·5 + 512
