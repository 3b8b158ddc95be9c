"""`flashsfa train distill`: a converted model learns to do with its sparse features what it did with dense ones.

The paper's Eq. 8, L = L_LM + λ · mean over heads ‖Õ_h - stopgrad(O_h)‖². O_h is a head's output in the dense model as it was
before. The paper takes it from the same queries, keys and values as Õ_h; but then it moves with the weights that are to reach
it, and the distance grows (docs/notes/2026-11-26-quality.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..basis import FeatureBasis
from ..checks import require
from ..extras import install_hint
from ..huggingface import SFASettings, disable, from_pretrained
from ..huggingface.structure import attention_layers, most_positions, text_config
from ..huggingface.switch import load_basis
from .attention import Core, DenseCore, DistillCore, TargetCore, TrainedBasis, install, uninstall_sparse
from .data import IGNORED, batches
from .pretrain import Corpus, load_corpus, load_tokenizer, save
from .recipe import Distill, DistillRecipe, Lora
from .run import Annealing, RunDirectory, RunTrainer, bounded_exp, fit, prepare, total_steps

_ROWS = 2048  # logits compared at a time: in float32 they would be the largest tensors by far


def distill(recipe: DistillRecipe, directory: Path) -> dict[str, Any]:
    """Run `recipe` in `directory`; returns the figures that stand in its `result.json`: those of any run, and
    "perplexity_dense" and "perplexity_before", of the dense and the converted model before training. Perplexities are those of codes
    as they are trained: not beside exact tokens, and codes of topk not rounded to fewer bits; "as_kept" says whether the model's cache keeps
    them so.

    Raises `ValueError`, with nothing written, for a recipe that does not fit.
    """
    with RunDirectory(directory, recipe) as place:
        return _distill(recipe, place)


def _distill(recipe: DistillRecipe, place: RunDirectory) -> dict[str, Any]:
    model = _load(recipe.model)
    settings = SFASettings.from_config(model.config.sfa)
    require(
        settings.topk is not None or not (recipe.distill.anneal or recipe.distill.train_basis),
        f"model: {recipe.model} keeps keys in bits per axis: leave out distill.anneal, as they have no budget of features, and "
        "distill.train_basis, as the bits are those of their basis",
    )
    lora = recipe.distill.lora
    widest = getattr(text_config(model), "hidden_size", None)
    require(
        lora is None or widest is None or lora.rank <= widest,
        f"distill.lora.rank must be at most the model's hidden size of {widest}, got {lora and lora.rank}",
    )
    tokenizer = load_tokenizer(recipe.data.tokenizer or recipe.model)
    limit = most_positions(model) or recipe.data.context
    require(recipe.data.context <= limit, f"data.context: the model has {limit} positions, got {recipe.data.context}")
    warmup = recipe.distill.warmup
    corpus = load_corpus(
        recipe.data, recipe.training, tokenizer, text_config(model).vocab_size,
        None if warmup is None else (warmup.text, warmup.tokens),
    )  # fmt: skip
    basis = load_basis(recipe.model)
    layers = _install(model, basis, recipe.distill)
    teacher = _teacher(recipe.model) if recipe.distill.weight or recipe.distill.logits else None
    trained: Any = model if recipe.distill.lora is None else _with_adapters(model, recipe.distill.lora)
    callbacks = Annealing.of(model, recipe.distill.anneal, total_steps(recipe.training, recipe.data.context))
    trainer = prepare(
        DistillTrainer, place, trained, corpus.train, corpus.validation, corpus.collate, recipe.training,
        recipe.data.context, callbacks, settings=recipe.distill, teacher=teacher, targets=_targets(model, teacher, layers),
    )  # fmt: skip
    # FSDP moves buffers past the modules, and a compiled step cannot move bits per axis.
    for module in attention_layers(model):
        if hasattr(module, "sfa"):
            module.sfa.to(trainer.args.device)
    before = _perplexities(recipe.model, corpus, trainer)
    is_rounded = settings.rounds and settings.topk is not None
    as_kept = not (is_rounded or settings.recent or settings.first or settings.value_tolerance)
    result = fit(trainer, place) | before | {"as_kept": as_kept}

    def finish() -> None:
        if recipe.distill.lora is not None:
            trainer.model = trained.merge_and_unload()
        uninstall_sparse(model, basis)

    save(trainer, place, recipe, result, tokenizer, finish)
    return result


class DistillTrainer(RunTrainer):
    """Adds Eq. 8 and the divergence of logits to the language modelling loss, and logs each by its name."""

    def __init__(
        self, place: RunDirectory, *, settings: Distill, teacher: Any | None,
        targets: list[tuple[DistillCore, TargetCore]], **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(place, **options)
        self._settings, self._targets = settings, targets
        self._teacher = None if teacher is None else teacher.to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._teacher is not None:
            # Of the model that is trained accelerate wraps the forward pass itself.
            with torch.no_grad(), self.accelerator.autocast():
                dense = self._teacher(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
        for core, target in self._targets:
            core.target = target.out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.note("lm_loss", loss * self.current_gradient_accumulation_steps)
        terms: list[tuple[str, float, Tensor]] = []
        distances = [core.distance for core, _ in self._targets if core.distance is not None]
        if distances:
            terms.append(("attention_distance", self._settings.weight, torch.stack(distances).mean()))
        if self._settings.logits:
            terms.append(("divergence", self._settings.logits, divergence(dense, outputs.logits, inputs["labels"])))
        for name, weight, value in terms:
            self.note(name, value)
            # The language modelling loss is a share of the whole step's already.
            loss = loss + weight * value / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def divergence(target: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """KL(target ‖ logits), the mean over predicted tokens; both [B, N, V]. The gradient has the precision of `target`."""
    kept = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # [B, N], the last token predicts none
    found: Tensor = _Divergence.apply(target.flatten(0, 1), logits.flatten(0, 1), kept.flatten())
    return found


class _Divergence(torch.autograd.Function):
    """The mean of KL(target ‖ logits) over those of T rows that are kept. Its gradient is made on the way, in the dtype of the target: all
    that a step keeps, where autograd would keep the logarithms of both sides in float32. The logits that are trained come in float32, as
    accelerate converts them."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
        count = kept.sum().clamp(min=1)
        total = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(target)  # [T, V]
        for counts, part, *both in zip(
            *(x.split(_ROWS) for x in (kept[:, None], gradient, target, logits)), strict=True
        ):
            one, other = (x.float().log_softmax(-1) for x in both)
            share = one.exp()
            total += torch.where(counts, share * (one - other), 0).sum()
            part.copy_(torch.where(counts, other.exp() - share, 0))
        ctx.save_for_backward(gradient, count)
        ctx.dtype = logits.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[None, Tensor, None]:
        gradient, count = ctx.saved_tensors
        return None, gradient.to(ctx.dtype, copy=True).mul_(of_loss / count), None


@torch.no_grad()
def _perplexities(path: str, corpus: Corpus, trainer: RunTrainer) -> dict[str, float]:
    """Validation perplexity of the model before training, dense and sparse, by the attention that it is trained with.

    Every process computes both: then none waits for another.
    """
    device, at_a_time = trainer.args.device, trainer.args.per_device_eval_batch_size
    model = _load(path).eval().to(device)
    windows: Any = corpus.validation
    found = {}
    for name, make in (
        ("perplexity_before", lambda index, module: DistillCore(module.sfa) if hasattr(module, "sfa") else DenseCore()),
        ("perplexity_dense", lambda index, module: DenseCore()),
    ):
        install(model, make)
        total, predicted = 0.0, 0
        for batch in batches(windows, len(windows), at_a_time, corpus.collate, device):
            with trainer.accelerator.autocast():
                total += float(model(**batch, num_items_in_batch=1).loss)
            predicted += int((batch["labels"] != IGNORED).sum())
        found[name] = bounded_exp(total / predicted)
    return found


def _load(path: str) -> Any:
    """The converted model, in float32 to be trained."""
    try:
        model = from_pretrained(path, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    require(
        model.get_output_embeddings() is not None, f"model: {path} holds a {type(model).__name__}: no language model"
    )
    return model


def _teacher(path: str) -> Any:
    """The model as it is before, dense and frozen."""
    dense = disable(_load(path)).eval().requires_grad_(False)
    install(dense, lambda index, module: TargetCore())
    return dense


def _targets(model: Any, teacher: Any | None, layers: list[int]) -> list[tuple[DistillCore, TargetCore]]:
    """The pairs that Eq. 8 compares."""
    if teacher is None:
        return []
    ours: list[Any] = attention_layers(model)
    theirs: list[Any] = attention_layers(teacher)
    return [(ours[i].sfa_core, theirs[i].sfa_core) for i in layers]


def _install(model: Any, basis: FeatureBasis | None, settings: Distill) -> list[int]:
    """Give `model` the cores it is trained with; returns the layers that Eq. 8 looks at."""
    modules = attention_layers(model)
    sparse = [i for i, module in enumerate(modules) if hasattr(module, "sfa")]
    layers = sparse if settings.layers is None else settings.layers
    wrong = [i for i in layers if i not in sparse]
    require(not wrong, f"distill.layers: layers {wrong} are not sparse in this model; {sparse} are")
    require(
        not settings.train_basis or basis is not None,
        "distill.train_basis: the model has no basis; convert it with one",
    )

    def core(index: int, module: Any) -> Core:
        if index not in sparse:
            return DenseCore()
        trained = TrainedBasis(basis[index]) if settings.train_basis and basis is not None else None
        return DistillCore(module.sfa, trained)

    install(model, core)
    return layers if settings.weight else []


def _with_adapters(model: Any, settings: Lora) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"{error}: {install_hint('train')}") from error
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    return get_peft_model(
        model, LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    )
