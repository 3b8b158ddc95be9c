"""vLLM's names, a model as its workers see it, and engines that serve one. All but the layout's tests need vLLM: `make test-vllm`."""

import functools
import gc
import importlib
import importlib.util
import os
from types import SimpleNamespace

import pytest

from vllm_server import PAGE, D

if importlib.util.find_spec("vllm"):  # which reads these when it is imported
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines run in this process, and start in seconds
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

_MODULES = (
    "config", "distributed", "v1.attention.backend", "v1.attention.backends.registry", "v1.attention.backends.utils",
    "v1.kv_cache_interface",
)  # fmt: skip


@pytest.fixture(scope="session")
def vllm():
    """vLLM's names in one place."""
    pytest.importorskip("vllm")
    names = {}
    for module in _MODULES:
        names |= vars(importlib.import_module(f"vllm.{module}"))
    from vllm.platforms import current_platform

    # vLLM looks for its kernels in every module, and stumbles over those of numba: once, before decode imports it
    current_platform.register_triton_kernel_overrides()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "register_triton_kernel_overrides", classmethod(lambda cls: None))
        yield SimpleNamespace(**names)


@pytest.fixture
def serve(vllm, monkeypatch, tmp_path):
    """Sets the model that vLLM serves: its "sfa" settings, and its basis beside the weights."""
    from flashsfa.vllm import settings

    def serve(basis=None, rank=0, ranks=1, speculative=None, model_type="llama", rope=None, longest=256, **sfa):
        if basis is not None:
            (tmp_path / settings.BASIS_FILE).parent.mkdir(exist_ok=True)
            basis.save(tmp_path / settings.BASIS_FILE)
            sfa = {"has_basis": True, **sfa}
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=SimpleNamespace(
                    model_type=model_type, head_dim=D, rope_parameters=rope, num_hidden_layers=3, **sfa and {"sfa": sfa}
                ),
                model=str(tmp_path),
                max_model_len=longest,
            ),
            cache_config=SimpleNamespace(block_size=PAGE),
            scheduler_config=SimpleNamespace(max_num_seqs=30),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=speculative,
            use_v2_model_runner=False,
        )
        monkeypatch.setattr(settings, "_seen", None)
        for name, answer in (
            ("get_current_vllm_config", config), ("get_current_vllm_config_or_none", config),
            ("get_tensor_model_parallel_rank", rank), ("get_tensor_model_parallel_world_size", ranks),
        ):  # fmt: skip
            monkeypatch.setattr(settings, name, lambda answer=answer: answer)
        return config

    return serve


@pytest.fixture(scope="session")
def folder(vllm, tmp_path_factory):
    """`folder(name)` holds the model `name` of vllm_models; `folder.expected(name, prompts, new)` is what transformers generates."""
    from vllm_models import generate, save

    @functools.cache
    def made(name):
        place = tmp_path_factory.mktemp(name.replace(" ", "-"))
        return place, save(name, place)

    def folder(name):
        return str(made(name)[0])

    @functools.cache
    def expected(name, prompt, new):
        return generate(made(name)[1], list(prompt), new)

    folder.expected = lambda name, prompts, new: [expected(name, tuple(prompt), new) for prompt in prompts]
    return folder


@pytest.fixture(scope="session")
def start(vllm, folder):
    """`start(name, **arguments)`: an engine that serves the model `name` of vllm_models in this process. One at a time; asked for
    the same again, the same one."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from vllm import LLM

    running = {}

    def stop():
        for engine in running.values():
            engine.llm_engine.engine_core.shutdown()
        running.clear()
        gc.collect()
        cleanup_dist_env_and_memory()

    def start(name, **arguments):
        key = name, *sorted(arguments.items(), key=str)
        if repr(key) not in running:
            stop()
            arguments = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 16} | arguments
            running[repr(key)] = LLM(
                folder(name), dtype="float32", max_model_len=512, kv_cache_memory_bytes=2**25, seed=0,
                disable_log_stats=False, **{"enforce_eager": True} | arguments,
            )  # fmt: skip
        return running[repr(key)]

    yield start
    stop()


@pytest.fixture(scope="session")
def complete(vllm):
    """`complete(engine, prompts, new)`: the `new` most likely tokens after each prompt, all prompts at once."""
    from vllm import SamplingParams

    def complete(engine, prompts, new):
        greedy = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
        return [list(x.outputs[0].token_ids) for x in found]

    return complete
