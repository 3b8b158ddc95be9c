"""The backend has what vLLM asks of one, says what it cannot do, and is registered once."""

import importlib
import inspect
import logging

import pytest
import torch

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
    assert not backend.SparseFeatureBackend.forward_includes_kv_cache_update
    config = dict(kv_cache_dtype="auto", block_size=16, use_mla=False, has_sink=False, use_sparse=False,
                  use_mm_prefix=False, use_per_head_quant_scales=False, device_capability=None, attn_type="decoder")  # fmt: skip
    check = backend.SparseFeatureBackend.validate_configuration
    assert check(head_size=128, dtype=torch.bfloat16, has_sliding_window=True, **config) == []
    assert check(head_size=512, dtype=torch.bfloat16, **config) == ["head_size not supported"]
    assert check(head_size=64, dtype=torch.bfloat16, **config | {"kv_cache_dtype": "fp8"})


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
    serve(**CODING, layers=[0])
    with pytest.raises(ValueError, match="codes every layer"):
        SparseFeatureImpl(*ordinary)
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
    assert not caplog.records
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
        (
            "plain",
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculation by n-grams",
        ),
        ("dense", {"attention_backend": "CUSTOM"}, "config.json has no settings"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "has_basis": True}}}, "is no local file"),
        ("basis", {"hf_overrides": {"sfa": {"topk": 8, "dense_dims": 16}}}, "settings name none"),
        ("basis", {"hf_overrides": {"sfa": {"topk": None, "has_basis": True}}}, "with topk, and a basis"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "layers": [0]}}}, "codes every layer"),
        ("plain", {"hf_overrides": {"sfa": {"topk": 8, "recent": 32}}}, "codes every token"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(vllm, folder, name, arguments, words):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=words):
        EngineArgs(folder(name), dtype="float32", max_model_len=512, **arguments).create_engine_config()
