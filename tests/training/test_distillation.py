"""Eq. 8, and distillation runs of tiny models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flashsfa
from flashsfa import reference
from flashsfa.huggingface.switch import BASIS_FILE
from flashsfa.training.attention import DistillCore, TargetCore, TrainedBasis, Visible, install
from flashsfa.training.data import IGNORED
from flashsfa.training.distill import DistillTrainer, divergence
from flashsfa.training.run import RunTrainer
from tiny import CONTEXT, QWEN3, VOCABULARY, Coding, distill_content, refused, result, run, saved_loss, transformers

ONCE = {"save_every": 1000, "evaluate_every": 1000}  # at the end


def test_eq8_is_the_distance_to_its_target():
    q, k, v = (torch.randn(2, h, 6, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    core = DistillCore(Coding())
    core.target = target = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    out, loss = core(q, k, v, Visible(0.3)), core.distance
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    keep = [reference.topk_rows(x, 3, dense_dims=2).detach() != 0 for x in (q, repeated[0])]
    sparse = F.scaled_dot_product_attention(q * keep[0], repeated[0] * keep[1], repeated[1], is_causal=True, scale=0.3)
    torch.testing.assert_close(out, sparse)
    expected = (sparse - target).square().sum(-1).mean((0, 2))  # [Hq]
    torch.testing.assert_close(loss, expected.float(), check_dtype=False)
    grads = torch.autograd.grad(loss.mean(), (q, k, v))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.mean(), (q, k, v)), rtol=1e-5, atol=1e-7)
    silent = DistillCore(Coding())
    silent(q, k, v, Visible(0.3))
    assert silent.distance is None
    silent.target = target
    silent.eval()(q, k, v, Visible(0.3))
    assert silent.distance is None


def test_the_target_of_eq8_is_dense_attention():
    q, k, v = (torch.randn(2, h, 6, 8, dtype=torch.float64) for h in (4, 2, 2))
    core = TargetCore()
    out = core(q, k, v, Visible(0.3))
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *repeated, is_causal=True, scale=0.3))
    assert core.out is out


@pytest.mark.parametrize("tokens", [5, 1500])  # one part of the rows, and several
def test_the_divergence_is_that_of_the_tokens_that_are_predicted(tokens):
    target, logits = torch.randn(2, 2, tokens, 11)
    labels = torch.randint(0, 11, (2, tokens))
    labels[1, 3:] = IGNORED
    kept = labels[:, 1:] != IGNORED
    logits[:, -1], target[1, 4] = torch.inf, torch.nan  # rows that predict no token
    sides = [x[:, :-1][kept].double() for x in (target, logits.requires_grad_())]
    one, other = (x.log_softmax(-1) for x in sides)
    expected = F.kl_div(other, one, log_target=True, reduction="batchmean")
    found = divergence(target, logits, labels)
    torch.testing.assert_close(found.double(), expected)
    (gradient,), (its,) = (torch.autograd.grad(3 * x, logits) for x in (expected, found))
    torch.testing.assert_close(its, gradient)
    assert not divergence(target, logits, torch.full_like(labels, IGNORED))


def test_the_gradient_of_the_divergence_has_the_precision_of_its_target():
    """As in a training in bf16: the dense model's logits come in bf16, those that are trained in float32."""
    target, logits = torch.randn(2, 6, 11).bfloat16(), torch.randn(2, 6, 11, requires_grad=True)
    labels = torch.randint(0, 11, (2, 6))
    found = divergence(target, logits, labels)
    assert [x.dtype for x in found.grad_fn.saved_tensors if x.shape == (12, 11)] == [torch.bfloat16]
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    assert gradient.dtype == torch.float32
    (expected,) = torch.autograd.grad(divergence(target.float(), logits, labels), logits)
    torch.testing.assert_close(gradient, expected, rtol=2**-8, atol=0)
    (again,) = torch.autograd.grad(found, logits)
    assert torch.equal(again, gradient)


def test_a_trained_basis_changes_no_score_before_topk():
    start = flashsfa.FeatureBasis.identity(2, 8)
    trained = TrainedBasis(start)
    with torch.no_grad():
        trained.factors += 0.1 * torch.randn_like(trained.factors)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    basis = trained()
    scores = basis.transform_query(q) @ basis.transform_key(k).repeat_interleave(2, 1).mT
    torch.testing.assert_close(scores, q @ k.repeat_interleave(2, 1).mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_reports_its_distance_once(checkpointing):
    model = flashsfa.enable(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=VOCABULARY, **QWEN3)), 4)
    install(model, lambda index, module: DistillCore(module.sfa))
    model.model.layers[1].self_attn.sfa_core.target = torch.zeros(2, 4, 8, 16)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()(torch.randint(0, VOCABULARY, (2, 8)), use_cache=False)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.sfa_core.distance is None
    assert second.sfa_core.distance.shape == (4,)
    second.sfa_core.distance.sum().backward()
    assert first.v_proj.weight.grad.abs().sum() > 0  # through the hidden states
    assert second.q_proj.weight.grad.abs().sum() > 0
    assert second.o_proj.weight.grad is None


def test_distillation_brings_sparse_outputs_to_dense_ones(tmp_path, content, converted, tokens):
    content["training"] |= {"tokens": 20 * 4 * CONTEXT, "learning_rate": 3e-3, **ONCE}
    settings = {"weight": 10.0, "logits": 1.0, "train_basis": True, "anneal": {"share": 0.1}}
    settings["warmup"] = {"text": str(tokens), "tokens": 64}
    assert run(tmp_path, distill_content(content, converted, **settings), command="distill") == 0
    rows = [row for row in result(tmp_path)["curve"] if "loss" in row]
    for name in ("attention_distance", "divergence", "lm_loss"):
        assert all(np.isfinite(row[name]) for row in rows)
    for row in rows:
        total = row["lm_loss"] + 10 * row["attention_distance"] + row["divergence"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    assert rows[-1]["loss"] < rows[3]["loss"]
    before, after = (flashsfa.FeatureBasis.load(d / BASIS_FILE) for d in (converted, tmp_path / "run" / "model"))
    assert not torch.equal(before.key, after.key)
    torch.testing.assert_close(after.key.mT @ after.query, before.key.mT @ before.query, rtol=1e-4, atol=1e-4)
    model = flashsfa.from_pretrained(tmp_path / "run" / "model")
    assert model.config.sfa["topk"] == 3
    assert model.config.use_cache
    ids = torch.from_numpy(np.load(tokens)[: 8 * CONTEXT].astype(np.int64)).view(8, CONTEXT).to(model.device)
    loss = model.eval()(ids, labels=ids, use_cache=False).loss
    assert float(loss.detach()) == pytest.approx(result(tmp_path)["validation_loss"], rel=1e-4)


def head_outputs(model, ids):
    """What each layer's heads give to the output projection, [layers, B, N, Hq · Dv]."""
    seen = []
    modules = [layer.self_attn.o_proj for layer in model.model.layers]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    with torch.no_grad():
        model.eval()(ids.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def test_distillation_brings_heads_to_the_dense_model_as_it_was(tmp_path, content, converted, tokens):
    """Dense attention of the weights that are being trained is another target, and runs away from them."""
    sparse = flashsfa.from_pretrained(converted)
    with torch.no_grad():
        for layer in sparse.model.layers:
            layer.self_attn.q_norm.weight *= 3  # attention that is not flat
    sparse.save_pretrained(converted)
    content["training"] |= {"tokens": 100 * 4 * CONTEXT, "learning_rate": 3e-3, "warmup": 5, "micro_batch": 4, **ONCE}
    assert run(tmp_path, distill_content(content, converted, weight=1e4), command="distill") == 0
    ids = torch.from_numpy(np.load(tokens)[: 8 * CONTEXT].astype(np.int64)).view(8, CONTEXT)
    before = head_outputs(sparse, ids)
    dense = head_outputs(flashsfa.disable(sparse), ids)
    after = head_outputs(flashsfa.from_pretrained(tmp_path / "run" / "model"), ids)
    assert (after - dense).norm() < 0.8 * (before - dense).norm()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_dense_model_runs_in_the_precision_of_the_recipe(
    tmp_path, content, converted, monkeypatch, precision, dtype
):
    seen = {}
    for core in (TargetCore, DistillCore):
        forward = core.forward

        def looked_at(self, q, k, v, visible, core=core, forward=forward):
            out = forward(self, q, k, v, visible)
            seen.setdefault(core, set()).update((q.dtype, k.dtype, v.dtype, out.dtype))
            return out

        monkeypatch.setattr(core, "forward", looked_at)
    content["training"] |= {"precision": precision, "tokens": 2 * 4 * CONTEXT, **ONCE}
    assert run(tmp_path, distill_content(content, converted), command="distill") == 0
    assert seen == {TargetCore: {dtype}, DistillCore: {dtype}}


def test_distillation_without_a_loss_term_is_plain_fine_tuning(tmp_path, content, converted):
    assert run(tmp_path, distill_content(content, converted, weight=0.0, layers=[1]), command="distill") == 0
    rows = [row for row in result(tmp_path)["curve"] if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["lm_loss"]) for row in rows)


def test_distillation_with_adapters(tmp_path, content, converted):
    pytest.importorskip("peft")
    assert run(tmp_path, distill_content(content, converted, lora={"rank": 2}), command="distill") == 0
    model = flashsfa.from_pretrained(tmp_path / "run" / "model")
    before = flashsfa.from_pretrained(converted)
    changed = {
        n for (n, a), b in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed
    assert all("proj" in name for name in changed)
    assert result(tmp_path)["parameters"] == model.num_parameters()


def test_distillation_ends_with_a_table_of_dense_before_and_after(tmp_path, content, converted, tokens, capsys):
    assert run(tmp_path, distill_content(content, converted), command="distill") == 0
    out = capsys.readouterr().out
    for name in ("dense, before", "coded, before", "coded, after"):
        assert name in out
    found = result(tmp_path)
    ids = torch.from_numpy(np.load(tokens)[: 8 * CONTEXT].astype(np.int64)).view(8, CONTEXT)
    model = flashsfa.from_pretrained(converted).eval()
    for name, switch in (("perplexity_before", lambda x: x), ("perplexity_dense", flashsfa.disable)):
        with torch.no_grad():
            loss = float(switch(model)(ids.to(model.device), labels=ids.to(model.device), use_cache=False).loss)
        assert found[name] == pytest.approx(np.exp(loss), rel=1e-4)
    assert found["perplexity"] != found["perplexity_before"]
    assert found["as_kept"]
    assert "as it is kept" not in out


def test_figures_of_another_cache_than_the_one_that_is_kept_say_so(tmp_path, content, converted, capsys):
    model = flashsfa.from_pretrained(converted)
    basis = flashsfa.FeatureBasis.load(converted / BASIS_FILE)
    flashsfa.enable(flashsfa.disable(model), 3, topk_query=16, dense_dims=2, basis=basis, recent=4).save_pretrained(
        converted
    )
    assert run(tmp_path, distill_content(content, converted), command="distill") == 0
    assert "flashsfa eval perplexity measures the cache as it is kept" in " ".join(capsys.readouterr().out.split())
    assert result(tmp_path)["as_kept"] is False
    assert "no token exact, features in 16 bits |" in (tmp_path / "run/model/README.md").read_text()


def test_distillation_of_packed_documents_is_compared_too(tmp_path, content, converted):
    content["data"]["packed"] = True
    assert run(tmp_path, distill_content(content, converted), command="distill") == 0
    assert {"perplexity_dense", "perplexity_before"} <= result(tmp_path).keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [7]}, "distill.layers: layers [7] are not sparse"),
        ({"weight": -1}, "distill.weight must not be negative"),
        ({"lora": {"rank": 2}, "train_basis": True}, "distill.train_basis: not together with distill.lora"),
        (
            {"warmup": {"text": "/nowhere.npy", "tokens": 5}},
            "distill.warmup.text: token file /nowhere.npy does not exist",
        ),
    ],
)
def test_a_wrong_distillation_is_refused(tmp_path, content, converted, capsys, settings, message):
    assert run(tmp_path, distill_content(content, converted, **settings), command="distill") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_distillation_starts_from_a_converted_model(tmp_path, content, capsys):
    assert run(tmp_path, distill_content(content, tmp_path / "nothing"), command="distill") == 2
    assert "model: " in capsys.readouterr().err
    assert DistillTrainer.compute_loss is not RunTrainer.compute_loss


@pytest.fixture
def in_axes(converted):
    """A converted model that keeps keys in bits per axis, six bytes of them, and values in 4 bits."""
    dense = flashsfa.disable(flashsfa.from_pretrained(converted))
    basis = flashsfa.calibrate(dense, torch.randint(0, VOCABULARY, (2, 32)), key_bytes=6)
    flashsfa.enable(dense, basis=basis, cache_dtype="int4").save_pretrained(converted)
    return converted


@pytest.mark.parametrize("packed", [False, True])
def test_keys_in_bits_per_axis_are_trained_as_the_cache_keeps_them(tmp_path, content, in_axes, tokens, packed):
    content["data"]["packed"] = packed
    content["training"] |= {"tokens": 40 * 4 * CONTEXT, "learning_rate": 3e-3, **ONCE}
    assert run(tmp_path, distill_content(content, in_axes, weight=10.0), command="distill") == 0
    found = result(tmp_path)
    assert found["as_kept"]
    assert found["perplexity"] < found["perplexity_before"]
    model, before = (flashsfa.from_pretrained(path) for path in (tmp_path / "run/model", in_axes))
    for (name, x), y in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(x, y), name  # gradients pass through what is rounded
    if not packed:
        assert saved_loss(tmp_path, tokens) == pytest.approx(found["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("settings", [{"anneal": {"share": 0.5}}, {"train_basis": True}])
def test_what_bits_per_axis_have_no_use_for_is_refused(tmp_path, content, in_axes, capsys, settings):
    code = run(tmp_path, distill_content(content, in_axes, **settings), command="distill")
    refused(capsys, code, "keeps keys in bits per axis", "leave out distill.anneal", "distill.train_basis")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_keys_in_bits_per_axis_are_trained_by_compiled_models(tmp_path, content, in_axes):
    content["training"] |= {"tokens": 2 * 4 * CONTEXT, "compile": True, "precision": "bf16", **ONCE}
    assert run(tmp_path, distill_content(content, in_axes, weight=1.0), command="distill") == 0
