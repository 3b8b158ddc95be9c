"""vLLM's names, from vLLM or from the stand-ins, and the model that it serves."""

import importlib
import sys
import types
from types import SimpleNamespace

import pytest

import flashsfa.vllm
from vllm_server import D
from vllm_stand_ins import HAS_VLLM, STAND_INS


@pytest.fixture(scope="module")
def vllm():
    """vLLM's names in one place: its own where it is installed, else the stand-ins, which leave with this module."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_VLLM:
            for name, content in STAND_INS.items():
                module = types.ModuleType(name)
                vars(module).update(content)
                patch.setitem(sys.modules, name, module)
            for name in ("backend", "settings"):  # so that the end of this module forgets them
                patch.setitem(sys.modules, f"flashsfa.vllm.{name}", None)
                del sys.modules[f"flashsfa.vllm.{name}"]
                patch.setattr(flashsfa.vllm, name, None, raising=False)
            importlib.import_module("flashsfa.vllm.backend")
        names = {}
        for module in STAND_INS:
            names |= vars(importlib.import_module(module))
        yield SimpleNamespace(**names)


@pytest.fixture
def serve(vllm, monkeypatch, tmp_path):
    """Sets the model that vLLM serves: its "sfa" settings, and its basis beside the weights."""
    from flashsfa.vllm import settings

    def serve(basis=None, rank=0, ranks=1, speculative=None, model_type="llama", rope=None, **sfa):
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
            ),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=speculative,
        )
        monkeypatch.setattr(settings, "_seen", None)
        for name, answer in (
            ("get_current_vllm_config", config), ("get_current_vllm_config_or_none", config),
            ("get_tensor_model_parallel_rank", rank), ("get_tensor_model_parallel_world_size", ranks),
        ):  # fmt: skip
            monkeypatch.setattr(settings, name, lambda answer=answer: answer)
        return config

    return serve
