"""`vllm serve` of a folder that flashsfa wrote, over HTTP, on two tensor-parallel ranks."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm")
from vllm_models import UNEVEN, prompts

NEW, PATIENCE = 16, 300  # seconds


@pytest.fixture
def address(folder, tmp_path):
    """Of a server of the model with a basis, which each rank takes its heads of."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder("basis"), "--port", str(port), "--dtype", "float32", "--max-model-len",
        "512", "--enforce-eager", "--kv-cache-memory-bytes", str(2**25), "--tensor-parallel-size", "2",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as server:
        until = time.monotonic() + PATIENCE
        url = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(0.5)
        yield url
        server.terminate()


def test_requests_over_http(folder, address):
    asked = prompts(UNEVEN)
    expected = folder.expected("basis", asked, NEW)

    def complete(prompt):
        body = {
            "model": folder("basis"), "prompt": prompt, "max_tokens": NEW, "min_tokens": NEW, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(complete, asked)) == expected
