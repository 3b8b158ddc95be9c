"""positions="channel": RoPE on the dense channel alone, in GPT-2 and Qwen3."""

import copy
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashsfa

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface import StaticSparseCache  # noqa: E402
from flashsfa.huggingface.positions import channel_first  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

PROMPT, NEW, DIMS, HEAD_DIM = 20, 5, 4, 16
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def make(family):
    common = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1, "initializer_range": 0.3}
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=48, n_layer=2, n_head=3, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **common
        )
    else:
        sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
        sizes |= {"num_key_value_heads": 2, "head_dim": HEAD_DIM, "max_position_embeddings": 64}
        config = transformers.Qwen3Config(**common, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def enable(model, **options):
    return flashsfa.enable(model, 3, **{"dense_dims": DIMS, "positions": "channel", **options})


@pytest.fixture(params=["gpt2", "qwen3"])
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return enable(make(family))


@pytest.fixture
def ids():
    return torch.randint(1, 61, (3, PROMPT))


@pytest.fixture
def mask():
    """Left padding of 5 and 0 tokens, and of all but one."""
    return (torch.arange(PROMPT) >= torch.tensor([5, 0, PROMPT - 1])[:, None]).long()


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize("chunk", [None, 7, 18], ids=["whole", "few", "many"])
@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_generation_equals_no_cache(model, ids, mask, implementation, chunk):
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, cache_implementation=implementation,
        prefill_chunk_size=chunk, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    mask = torch.nn.functional.pad(mask, (0, NEW), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, found.sequences, attention_mask=mask, position_ids=positions)[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected.float(), rtol=1e-5, atol=2e-5)


def test_positions_are_relative_and_count(model, ids):
    """Sparse features carry no position, so that a shift changes nothing; with RoPE on all of a head it would."""
    positions = torch.arange(PROMPT)[None]
    here = logits(model, ids, position_ids=positions)
    torch.testing.assert_close(logits(model, ids, position_ids=positions + 9), here, rtol=1e-4, atol=1e-5)
    swapped = ids[:, [1, 0, *range(2, PROMPT)]]
    assert (logits(model, swapped, position_ids=positions)[:, -1] - here[:, -1]).abs().max() > 1e-3


def test_sparse_features_are_those_of_the_first_position(model, ids):
    keys = []

    def look(module, query, key, value, *args, **kwargs):
        keys.append(module.sfa.keys(key))
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], 2), None

    transformers.AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    same = ids[:, :1].expand(-1, PROMPT)
    logits(model, same)
    channel, rest = keys[0].split((DIMS, HEAD_DIM - DIMS), dim=-1)
    torch.testing.assert_close(rest, rest[:, :, :1].expand_as(rest), **CLOSE)
    frequency = 10000.0 ** -torch.tensor([0.0, 0.5])  # those of a head as wide as the channel
    angle = torch.arange(PROMPT)[:, None] * frequency
    first, second = channel[:, :, :1].chunk(2, dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    torch.testing.assert_close(channel, torch.cat(turned, dim=-1), rtol=1e-5, atol=1e-5)


def test_gpt2_drops_its_learned_positions(ids):
    model = enable(make("gpt2"))
    before = logits(model, ids)
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
    assert torch.equal(logits(model, ids), before)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert (model.transformer.wpe.weight.grad == 0).all()


def test_two_calls_of_a_gpt2_know_their_own_positions():
    """Checkpointing repeats the first one's layers after the second one ran; a thread's call may be within another's."""
    ids, losses, model = torch.randint(1, 61, (2, 12)), {}, enable(make("gpt2")).train()
    for repeats in (False, True):
        if repeats:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        for length, step in ((12, 1), (9, 1), (12, 3)):
            positions = torch.arange(length)[None] * step
            out = model(ids[:, :length], position_ids=positions, use_cache=False).logits.log_softmax(-1)[..., 5].sum()
            losses[repeats] = losses.get(repeats, 0) + length * step * out
        losses[repeats].backward()
        losses[repeats] = [x.grad.clone() for x in model.parameters()]
    torch.testing.assert_close(losses[True], losses[False], **CLOSE)


def test_threads_of_a_gpt2_know_their_own_positions():
    model, found, before = enable(make("gpt2")), {}, sys.getswitchinterval()
    prompts = [torch.randint(1, 61, (1, length)) for length in (7, 12)]
    expected = [logits(model, prompt) for prompt in prompts]

    def ask(i):
        found[i] = [torch.equal(logits(model, prompts[i]), expected[i]) for _ in range(50)]

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert found == {0: [True] * 50, 1: [True] * 50}


def test_switch_and_back(family, ids):
    model = make(family)
    dense, config = logits(model, ids), copy.deepcopy(model.config.to_dict())
    state = {name: x.clone() for name, x in (*model.named_buffers(), *model.named_parameters())}
    for dims in (8, DIMS, DIMS):
        enable(model, dense_dims=dims)
    assert (logits(model, ids) - dense).abs().max() > 1e-3
    assert flashsfa.enable(model, 3).config.sfa["positions"] is None
    torch.testing.assert_close(logits(flashsfa.enable(model, HEAD_DIM), ids), dense, **CLOSE)
    enable(model)
    flashsfa.disable(model)
    assert torch.equal(logits(model, ids), dense)
    assert model.config.to_dict() == config
    after = dict((*model.named_buffers(), *model.named_parameters()))
    assert after.keys() == state.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Adapted(torch.nn.Module):
    """A projection as peft's LoRA wraps it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.delta = torch.randn(48, 3 * 48, dtype=torch.float64)

    def forward(self, x):
        return self.base_layer(x) + x @ self.delta


def test_what_lora_adds_is_turned(ids):
    model = enable(make("gpt2"))
    attention = model.transformer.h[0].attn
    before = logits(model, ids)
    adapted = attention.c_attn = Adapted(attention.c_attn)
    found = logits(model, ids)
    attention.c_attn = adapted.base_layer
    assert torch.equal(logits(model, ids), before)
    with torch.no_grad():
        attention.c_attn.weight += adapted.delta
    torch.testing.assert_close(found, logits(model, ids), **CLOSE)


def test_a_failed_switch_leaves_the_model(ids, monkeypatch):
    model = make("qwen3")
    dense = logits(model, ids)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model.model.rotary_emb), "to", fail)
    with pytest.raises(torch.OutOfMemoryError):
        enable(model)
    assert torch.equal(logits(model, ids), dense)
    assert not hasattr(model.config, "sfa")
    assert not hasattr(model, "_sfa_dense_attention")


def test_save_and_load(model, family, ids, tmp_path):
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.sfa == model.config.sfa
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-6, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    again = flashsfa.from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    torch.testing.assert_close(logits(again, ids), expected, rtol=1e-6, atol=1e-6)


def test_transformers_alone_loads_the_dense_twin_of_a_qwen3(ids, tmp_path):
    """With every feature kept, sparse attention is the dense attention of what transformers loads."""
    model = enable(make("qwen3"), topk_query=HEAD_DIM)
    flashsfa.enable(model, HEAD_DIM - DIMS, dense_dims=DIMS, positions="channel").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-6, atol=1e-6)
    before = logits(loaded, ids)
    flashsfa.disable(enable(loaded))
    assert torch.equal(logits(loaded, ids), before)


def test_a_copy_is_a_model_of_its_own(model, ids):
    before = logits(model, ids)
    copied = flashsfa.disable(copy.deepcopy(model))
    assert (logits(copied, ids) - before).abs().max() > 1e-3
    assert torch.equal(logits(model, ids), before)
    other = ids[:, torch.randperm(PROMPT)][:, :7]
    copied = copy.deepcopy(model)
    logits(copied, other)  # its positions are not the model's
    assert torch.equal(logits(model, ids), before)


@pytest.mark.cpu  # torch cannot trace Tensor.unflatten under a default device
def test_compiled_static_decode_equals_eager(model, ids):
    torch._dynamo.reset()
    cache = StaticSparseCache(model, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        more = torch.randint(1, 61, (3, 4))
        found = torch.cat([compiled(x, past_key_values=cache).logits for x in more.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, logits(model, torch.cat((ids, more), dim=1))[:, PROMPT:], **CLOSE)


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes))


def stretched():
    model = make("qwen3")
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    return model


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (llama, {}, "for GPT-2 and Qwen3 models that are trained with it, not for llama"),
        (stretched, {}, "rope_parameters"),
        (lambda: make("qwen3"), {"dense_dims": 3}, "dense_dims must be even, 2 to 16, got 3"),
        (lambda: make("gpt2"), {"dense_dims": None}, "dense_dims must be even, 2 to 16, got 0"),
        (lambda: make("qwen3"), {"positions": "learned"}, "positions must be one of channel, None; got 'learned'"),
        (
            lambda: make("qwen3"),
            {"basis": flashsfa.FeatureBasis(*torch.eye(16).expand(2, 2, 2, 16, 16))},
            "positions='channel' has no basis",
        ),
    ],
)
def test_refusals(make_model, options, message, ids):
    model = make_model()
    dense = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        enable(model, **options)
    assert torch.equal(logits(model, ids), dense)
    assert not hasattr(model.config, "sfa")


def test_channel_first():
    """Pair i of RoPE is features i and i + 4."""
    x = torch.arange(8.0)
    assert channel_first(x, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(channel_first(x, 8), x)


def test_channel_first_is_one_launch():
    """Of heads that lie apart, too, as vLLM has them."""
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            calls.append(function)
            return function(*arguments, **(options or {}))

    x = torch.randn(5, 3, 8).transpose(0, 1)[None]
    with Calls():
        out = channel_first(x, 4)
    assert torch.equal(out, x[..., [0, 1, 4, 5, 2, 3, 6, 7]])
    assert out.is_contiguous()
    assert [f for f in calls if not f.is_view] == [torch.ops.aten.cat.default]
