"""The backend has what vLLM asks of one, says what it cannot do, and is registered once."""

import importlib
import inspect
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from flashsfa import FeatureBasis
from flashsfa.huggingface.settings import BASIS_FILE
from vllm_server import CODING, HKV, TOPK, D


def test_the_backend_has_every_name_that_vllm_calls(vllm, serve):
    from flashsfa.vllm import backend

    pairs = [
        (backend.SparseFeatureBackend, vllm.AttentionBackend),
        (backend.SparseFeatureImpl, vllm.AttentionImpl),
        (backend.SparseFeatureMetadataBuilder, vllm.AttentionMetadataBuilder),
    ]
    for mine, theirs in pairs:
        assert issubclass(mine, theirs)
        assert not inspect.isabstract(mine)
        for name in set(vars(mine)) & set(vars(theirs)) - {"__module__", "__doc__", "__orig_bases__", "__parameters__"}:
            if callable(getattr(mine, name)):
                assert list(inspect.signature(getattr(mine, name)).parameters) == list(
                    inspect.signature(getattr(theirs, name)).parameters
                ), name
    assert backend.SparseFeatureBackend.get_name() in vllm.AttentionBackendEnum.__members__
    assert backend.SparseFeatureBackend.forward_includes_kv_cache_update
    config = dict(kv_cache_dtype="auto", block_size=16, use_mla=False, has_sink=False, use_sparse=False,
                  use_mm_prefix=False, use_per_head_quant_scales=False, device_capability=None, attn_type="decoder")  # fmt: skip
    check = backend.SparseFeatureBackend.validate_configuration
    assert check(head_size=128, dtype=torch.bfloat16, has_sliding_window=True, **config) == []
    for change, reason in (
        ({"head_size": 512}, "head_size not supported"), ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"), ({"block_size": 8}, "block_size not supported"),
        ({"has_sink": True}, "attention sinks not supported"), ({"attn_type": "encoder_only"}, "attention type encoder_only not"),
        ({"use_mla": True}, "MLA not supported"), ({"use_kv_connector": True}, "KV connector not supported"),
        ({"use_dcp": True}, "DCP not supported"), ({"use_pcp": True}, "PCP not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
    ):  # fmt: skip
        reasons = check(**{"head_size": 128, "dtype": torch.bfloat16, **config, **change})
        assert any(reason in found for found in reasons), change


def test_what_cannot_run_is_refused(vllm, serve):
    from flashsfa.vllm.backend import SparseFeatureBackend, SparseFeatureImpl

    ordinary = (4, D, D**-0.5, HKV)
    serve(**CODING)
    for argument in (
        {"alibi_slopes": [0.5] * 4}, {"logits_soft_cap": 30.0}, {"kv_sharing_target_layer_name": "model.layers.0"},
        {"attn_type": "encoder_only"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="flashsfa's vLLM backend"):
            SparseFeatureImpl(*ordinary, **argument)
    serve(**CODING, query_pattern="1:2")
    with pytest.raises(ValueError, match="query_pattern must be one of"):
        SparseFeatureImpl(*ordinary)
    serve(**CODING, has_basis=True)
    with pytest.raises(ValueError, match="no local file"):
        SparseFeatureImpl(*ordinary)
    for exact in ({"recent": 32}, {"first": 4}):
        serve(**CODING, **exact)
        with pytest.raises(ValueError, match="codes every token"):
            SparseFeatureImpl(*ordinary)
    serve()
    with pytest.raises(ValueError, match=r"flashsfa\.enable.*--hf-overrides"):
        SparseFeatureImpl(*ordinary)
    spec = vllm.FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, head_size_v=32, dtype=torch.float16)
    serve(topk=40)
    with pytest.raises(ValueError, match="topk must be 1 to 32"):
        SparseFeatureBackend.customize_spec(spec)


def test_the_cache_spec_is_known_after_vllm_has_left_its_config(vllm, serve, monkeypatch):
    from flashsfa.vllm import settings

    serve(**CODING)
    settings.current_settings()
    monkeypatch.setattr(settings, "get_current_vllm_config_or_none", lambda: None)
    assert settings.current_settings().topk == TOPK


def test_the_backend_says_once_that_it_is_experimental(vllm, serve, caplog):
    from flashsfa.vllm import backend

    backend._warn_experimental.cache_clear()
    serve(**CODING)
    with caplog.at_level(logging.WARNING, logger="flashsfa"):
        for _ in range(2):
            backend.SparseFeatureImpl(4, D, 1.0, HKV)
    assert [x.levelname for x in caplog.records if "experimental" in x.message] == ["WARNING"]


def test_registering(vllm, caplog):
    import flashsfa.vllm

    custom = vllm.AttentionBackendEnum.CUSTOM
    custom.clear_override()
    flashsfa.vllm.register()
    flashsfa.vllm.register()  # vLLM may load a plugin several times
    assert custom.get_path() == "flashsfa.vllm.backend.SparseFeatureBackend"
    module, name = custom.get_path().rsplit(".", 1)
    assert inspect.isclass(getattr(importlib.import_module(module), name))
    assert not [x for x in caplog.records if x.name == "flashsfa"]
    vllm.register_backend(custom, "another.Backend")
    flashsfa.vllm.register()
    assert custom.get_path() == "another.Backend"
    assert "another.Backend" in caplog.text
    custom.clear_override()
    flashsfa.vllm.register()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("plain", {"attention_backend": "CPU_ATTN"}, "CPU_ATTN would ignore"),
        ("plain", {"kv_cache_dtype": "fp8"}, "widths of their own, not in --kv-cache-dtype fp8"),
        ("plain", {"block_size": 8}, "a multiple of 16 tokens, not --block-size 8"),
        ("plain", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connectors"),
        ("plain", {"kv_offloading_size": 1.0}, "KV connectors"),
        ("dense", {"attention_backend": "CUSTOM"}, "config.json has no settings"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "has_basis": True}}}, "is no local file"),
        ("basis", {"hf_overrides": {"sfa": {"topk": 8, "dense_dims": 16}}}, "settings name none"),
        ("basis", {"hf_overrides": {"sfa": {"topk": None, "has_basis": True}}}, "with topk, and a basis"),
        ("plain", {"hf_overrides": {"sfa": 8}}, "must be an object with a topk, got 8"),
        ("plain", {"hf_overrides": {"sfa": {"dense_dims": 16}}}, "topk is missing"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "surprise": 1}}}, "knows no surprise"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 60, "dense_dims": 16}}}, "topk must be 1 to 48"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "topk_query": 65}}}, "got 65"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "query_pattern": "1:2"}}}, "query_pattern must be one of"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "cache_dtype": "int3"}}}, "int3"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "layers": [1, 2]}}}, r"layers \[2\] do not exist"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "recent": 32}}}, "codes every token"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "first": 4}}}, "codes every token"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "prefill": "dense"}}}, "codes every token"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "positions": "channel"}}}, "does not turn the channel alone"),
        ("GPT-NeoX", {"hf_overrides": {"sfa": {"topk": 8, "positions": "channel"}}}, "Qwen3 models alone"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(vllm, folder, name, arguments, words):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=words):
        EngineArgs(folder(name), dtype="float32", max_model_len=512, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("draft", "arguments", "words"),
    [
        (None, {"method": "ngram_gpu", "prompt_lookup_max": 3}, "not by the method 'ngram_gpu'"),
        (None, {"method": "custom_class", "model": "a.Proposer"}, "not by the method 'custom_class'"),
        ("plain", {"method": "draft_model"}, 'has settings "sfa": draft with the dense model'),
        (
            "dense",
            {"method": "draft_model", "num_speculative_tokens": 16},
            "may guess 15 tokens, not num_speculative_tokens 16",
        ),
        ("dense", {"method": "draft_model", "attention_backend": "CPU_ATTN"}, "leave attention_backend out"),
        ("dense", {"method": "draft_model", "kv_cache_dtype": "fp8"}, "leave kv_cache_dtype out"),
    ],
)
def test_speculation_that_is_refused(vllm, folder, draft, arguments, words):
    from vllm.engine.arg_utils import EngineArgs

    model = {} if draft is None else {"model": folder(draft)}
    speculation = {"num_speculative_tokens": 2, **model, **arguments}
    with pytest.raises(ValueError, match=words):
        EngineArgs(
            folder("plain"), dtype="float32", max_model_len=512, speculative_config=speculation
        ).create_engine_config()


@pytest.mark.parametrize(
    ("layers", "factor", "words"),
    [(3, 1, r"the model needs \[L, Hkv, D, D\]"), (2, 9, "undo one another"), (2, float("nan"), "NaN")],
)
def test_a_basis_that_is_not_the_models_is_refused(vllm, folder, tmp_path, layers, factor, words):
    from vllm.engine.arg_utils import EngineArgs

    model = shutil.copytree(folder("basis"), tmp_path / "model")
    turn = torch.eye(64).expand(layers, 2, 64, 64).contiguous()
    FeatureBasis(factor * turn, turn).save(model / BASIS_FILE)
    with pytest.raises(ValueError, match=words):
        EngineArgs(str(model), dtype="float32", max_model_len=512).create_engine_config()


@pytest.mark.parametrize("layout", ["LBNHC", "BLNHC"])
def test_layouts_that_are_refused(vllm, serve, monkeypatch, layout):
    """Those in which the tokens of a head and page are apart, in vLLM's own words."""
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

    from flashsfa.vllm.backend import SparseFeatureBackend
    from vllm import envs as vllm_envs

    vllm_envs.disable_envs_cache()  # of an engine that ran before
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    served = [x.name for x in get_supported_kv_cache_layouts([SparseFeatureBackend])]
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_layout=None), kv_transfer_config=None)
    with pytest.raises(ValueError, match=f"VLLM_KV_CACHE_LAYOUT={layout} does not satisfy"):
        resolve_kv_cache_layout(config, [served])
