"""One run: its directory, its Trainer and its result.

The directory holds `recipe.yaml`, checkpoints while the run lasts, and at the end `result.json` and, if the model can be
loaded again, `model/`. The same command goes on where the run was stopped. Each of them is whole: it is written under another
name, and gets its own last. Modes are those of the umask.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..benchmarking.results import environment
from ..checks import require
from ..files import follow_umask, require_place, write_whole
from ..huggingface.attention import LayerCoding
from ..huggingface.switch import attention_layers
from .attention import EqualizedCore, FittedBasis, SparseCore, fit_bases
from .data import IGNORED, batches
from .recipe import Anneal, Attention, Training, differences, read, write

_log = logging.getLogger("flashsfa")

RECIPE, RESULT, MODEL = "recipe.yaml", "result.json", "model"
_FITTED_TOKENS = 16384  # that a basis is fitted to, as a calibration takes
_CHECKPOINT, _PARTIAL = "checkpoint-", ".partial"
_LARGEST_EXPONENT = 709  # of a float
_STATE = "trainer_state.json"
_ADVICE = "remove it to start anew, or name a new directory with -o"
_CHECKPOINT_PARTS = (_STATE, "scheduler.pt", "optimizer*", "rng_state*.pth")


class RunDirectory:
    """Where a run lives.

    Raises `ValueError`, with nothing written, if the run there is finished or is of another recipe, if its newest checkpoint
    lacks a part, or if something else is there; `OSError` if nothing can be written there.
    """

    def __init__(self, path: Path, recipe: Any) -> None:
        self.path, self._recipe = path, recipe
        self._missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        require(not path.exists() or path.is_dir(), f"{path} is a file: name a directory with -o")
        require_place(path)
        if path.is_dir() and any(not p.name.startswith(f".{RECIPE}-") for p in path.iterdir()):
            require((path / RECIPE).is_file(), f"{path} exists and holds no run: name a new directory with -o")
            require(not (path / RESULT).exists(), f"{path} holds a finished run: name a new directory with -o")
            try:
                before = read(type(recipe), path / RECIPE)
            except ValueError as error:
                raise ValueError(
                    f"{path} holds a run that cannot go on: {error}; name a new directory with -o"
                ) from error
            changed = differences(before, recipe)
            require(
                not changed,
                f"{path} holds a run of another recipe ({', '.join(changed)} differ): name a new directory with -o",
            )
        if (checkpoint := self.checkpoint) is not None:
            missing = [part for part in _CHECKPOINT_PARTS if not any(checkpoint.glob(part))]
            require(not missing, f"{checkpoint} is damaged ({', '.join(missing)} missing): {_ADVICE}")
            with _reading(checkpoint):
                state = json.loads((checkpoint / _STATE).read_bytes())
                require(
                    isinstance(state, dict) and f"{_CHECKPOINT}{state.get('global_step')}" == checkpoint.name,
                    f"{_STATE} is of another step",
                )

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint; each is whole, as it got its name last."""
        found = {p: p.name.removeprefix(_CHECKPOINT) for p in self.path.glob(f"{_CHECKPOINT}*")}
        foreign = [p for p, step in found.items() if not step.isdecimal()]
        require(not foreign, f"{', '.join(map(str, foreign))}: no checkpoint of this run, move it away")
        return max(found, key=lambda p: int(found[p]), default=None)

    @property
    def partial(self) -> Path:
        """Where a checkpoint, and the model at the end, is written before it gets its name."""
        return self.path / _PARTIAL

    def open(self) -> None:
        """Make the directory, with its recipe. A recipe that is there stays: it is the same."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.sweep()
        if not (self.path / RECIPE).exists():
            write(self._recipe, self.path / RECIPE)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Folders that were made for a run that never began go again."""
        for folder in self._missing if kind is not None else []:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()

    def sweep(self) -> None:
        """Remove what a kill, or a full disk, left half-written."""
        for path in (self.partial, *self.path.glob(f".{RECIPE}-*"), *self.path.glob(f".{RESULT}-*")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def keep(self, step: int) -> None:
        """The checkpoint of `step` is whole: give it its name and remove the one before."""
        before = self.checkpoint
        follow_umask(self.partial)
        (self.partial / f"{_CHECKPOINT}{step}").rename(self.path / f"{_CHECKPOINT}{step}")
        if before is not None and before.name != f"{_CHECKPOINT}{step}":
            shutil.rmtree(before)

    def close(self, result: dict[str, Any]) -> None:
        """The model, if there is one, is whole: give it its name, write the result, and remove the checkpoints."""
        if (model := self.partial / MODEL).exists():
            follow_umask(self.partial)
            shutil.rmtree(self.path / MODEL, ignore_errors=True)  # of an end that was cut off before it had a result
            model.rename(self.path / MODEL)
        content = {"recipe": asdict(self._recipe), **result}
        write_whole(self.path / RESULT, json.dumps(content, indent=1, default=str) + "\n")
        self.sweep()
        for path in self.path.glob(f"{_CHECKPOINT}*"):
            shutil.rmtree(path, ignore_errors=True)


class Annealing(TrainerCallback):
    """Shrinks the budget of `codings` from all sparse features to their own in halvings.

    Queries that are sparser than an early budget allows for follow it; dense queries stay dense.
    """

    def __init__(self, codings: Sequence[LayerCoding], sparse_dims: int, anneal: Anneal, steps: int) -> None:
        self._codings = codings
        self._goals = [coding.budget for coding in codings]
        self._budgets = []
        while sparse_dims > min(goal.topk for goal in self._goals):
            self._budgets.append(sparse_dims)
            sparse_dims //= 2
        self._until = max(1, round(anneal.share * steps))

    @classmethod
    def of(cls, model: Any, anneal: Anneal | None, steps: int) -> list[Annealing]:
        """The callbacks that a switched model needs: one, or none if `anneal` is None."""
        codings: list[Any] = [module.sfa for module in attention_layers(model) if hasattr(module, "sfa")]
        if anneal is None:
            return []
        require(
            all(coding.budget.query_pattern is None for coding in codings),
            "anneal: not with query_pattern, as no early budget fits the pattern",
        )
        return [cls(codings, codings[0].budget.sparse_dims, anneal, steps)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = state.global_step * len(self._budgets) // self._until
        self._set(self._budgets[stage] if stage < len(self._budgets) else 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # what is evaluated and saved then has its own budget
            self._set(0)

    def _set(self, least: int) -> None:
        for coding, goal in zip(self._codings, self._goals, strict=True):
            coding.budget = replace(goal, topk=max(goal.topk, least), topk_query=max(goal.topk_query, least))


class Settling(TrainerCallback):
    """Ends a gradient to all features after a share of the steps."""

    def __init__(self, cores: Sequence[SparseCore], share: float, steps: int) -> None:
        self._cores, self._until = cores, max(1, round(share * steps))

    @classmethod
    def of(cls, model: Any, attention: Attention, steps: int) -> list[Settling]:
        """The callbacks that a model trained so needs: one, or none for one gradient throughout."""
        if attention.gradient_share == 1:
            return []
        return [cls(_sparse_cores(model), attention.gradient_share, steps)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for core in self._cores:
            core.gradient = "all" if state.global_step < self._until else "kept"


class Fitting(TrainerCallback):
    """Fits the bases of a model to what it is trained on: after the steps that are dense, if there are some, and anew after each tenth of
    all steps, the last one excepted. The weights move on, and what follows RoPE cannot be taken in by them.

    Attributes:
        dense_steps: those before codes begin.
    """

    def __init__(
        self, cores: Sequence[SparseCore], dense_steps: int, steps: int, windows: Any, collate: Callable[..., Any]
    ) -> None:
        self._cores, self.dense_steps, self._windows, self._collate = cores, dense_steps, windows, collate
        every = max(1, steps // 10)
        self._fits = {*range(dense_steps, steps - every, every), dense_steps} - {0}  # a run begins with its bases

    @classmethod
    def of(
        cls, model: Any, attention: Attention, steps: int, windows: Dataset, collate: Callable[..., Any]
    ) -> list[Fitting]:
        """The callbacks that a model needs: one, or none if it has no such bases. `windows` are those that it is trained on.

        Raises `ValueError` for a share of dense steps that leaves none to them or to codes.
        """
        cores = [core for core in _sparse_cores(model) if isinstance(core.basis, FittedBasis)]
        share = attention.dense_share
        dense_steps = round(share * steps)
        require(
            share == 0 or 0 < dense_steps < steps,
            f"attention.dense_share: {share} leaves {dense_steps} dense steps, and this run has {steps}: it needs one of each kind at least",
        )
        return [cls(cores, dense_steps, steps, windows, collate)] if cores else []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for core in self._cores:
            core.is_dense = state.global_step < self.dense_steps
        if state.global_step in self._fits:
            try:
                # the first windows, the same ones in every process
                count = min(len(self._windows), -(-_FITTED_TOKENS // len(self._windows[0]["input_ids"])))
                at_a_time = args.per_device_train_batch_size
                first = batches(self._windows, count, at_a_time, self._collate, args.device)
                fit_bases(model, self._cores, first)
            except ValueError as error:
                raise ValueError(
                    f"training stopped at step {state.global_step}: no basis fits the model: {error}. A lower training.learning_rate "
                    "or a longer training.warmup may help"
                ) from error


def _sparse_cores(model: Any) -> list[SparseCore]:
    return [module for module in model.modules() if isinstance(module, SparseCore)]


class Equalizing(TrainerCallback):
    """Updates the sizes of query features after each step."""

    def __init__(self, cores: Sequence[EqualizedCore]) -> None:
        self._cores = cores

    @classmethod
    def of(cls, model: Any) -> list[Equalizing]:
        """The callbacks that a model needs: one, or none if it has no such sizes."""
        cores = [module for module in model.modules() if isinstance(module, EqualizedCore)]
        return [cls(cores)] if cores else []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for core in self._cores:
            core.update()


class RunTrainer(Trainer):
    """transformers' Trainer with whole checkpoints and a stop at the first loss that is no number."""

    def __init__(self, place: RunDirectory, **options: Any) -> None:
        super().__init__(**options)
        self._place, self._saves = place, False
        self._terms: dict[str, list[torch.Tensor]] = {}
        self._predicted = 0.0  # tokens of a validation window, on average
        self._ticks: list[tuple[int, float]] = []  # step and time of each log, which waits for the device
        self.add_callback(_LogBeforeSaving())

    def note(self, name: str, value: torch.Tensor) -> None:
        """Log the mean of `value` over the steps between two logs."""
        self._terms.setdefault(name, []).append(value.detach())

    def last_good(self) -> str:
        """Where a run that stops here goes on, for messages."""
        checkpoint = self._place.checkpoint
        return "no checkpoint was written yet" if checkpoint is None else f"the last good checkpoint is {checkpoint}"

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the intervals between logs; None for a run without two. Of dense steps and later ones with codes the mean of
        their medians, weighted by their number, where both have intervals."""
        dense = next((x.dense_steps for x in self.callback_handler.callbacks if isinstance(x, Fitting)), 0)
        whole = self.state.max_steps
        before, after = self._rates(0, dense), self._rates(dense, whole)
        if before and after:
            return (statistics.median(before) * dense + statistics.median(after) * (whole - dense)) / whole
        rates = self._rates(0, whole)
        return statistics.median(rates) if rates else None

    def _rates(self, first: int, last: int) -> list[float]:
        """Seconds per step of each interval between two logs from `first` to `last`."""
        return [
            (later - earlier) / (step - before)
            for (before, earlier), (step, later) in itertools.pairwise(self._ticks)
            if first <= before < step <= last
        ]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self._predicted:
            windows: Any = self.eval_dataset
            labels = [self.data_collator([windows[i]])["labels"] for i in range(len(windows))]
            self._predicted = sum(int((x != IGNORED).sum()) for x in labels) / len(windows)
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        """A loss whose mean over windows is that over all tokens, however they are spread over batches and processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            total = model(**inputs, num_items_in_batch=1).loss
        return total / (len(inputs["labels"]) * self._predicted), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._ticks.append((self.state.global_step, time.perf_counter()))
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"training stopped: {name} is {logs[name]} at step {self.state.global_step}; {self.last_good()}. A lower "
                    "training.learning_rate or a longer training.warmup may help"
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saves = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._place.keep(self.state.global_step)
        except Exception as error:  # a full disk is another error in each of the libraries that write here
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written: {error}; {self.last_good()}"
            ) from error
        finally:
            self._saves = False
            if self.args.should_save:
                shutil.rmtree(self._place.partial, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that a checkpoint lacks would stay as they were drawn."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        missing = sorted(set(load_result.missing_keys) - {*tied, *tied.values()})
        require(not missing, f"it lacks {', '.join(missing[:4])}")
        require(
            not load_result.unexpected_keys, f"it has {', '.join(load_result.unexpected_keys[:4])} of another model"
        )
        super()._issue_warnings_after_load(load_result)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._place.partial) if self._saves else super()._get_output_dir(trial)


@contextmanager
def _reading(checkpoint: Any) -> Iterator[None]:
    """What the block cannot make of a checkpoint is a `ValueError` of one line. A disk or a memory that fails stays what it is."""
    try:
        yield
    except Exception as error:
        is_cut = (
            getattr(error, "errno", None) == errno.EINVAL
        )  # torch's reader seeks before the start of a file that was cut
        if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)) and not is_cut:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{checkpoint} is damaged ({reason}): {_ADVICE}") from error


class _LogBeforeSaving(TrainerCallback):
    """What is saved has been looked at: a loss that is no number stops the run in `log`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True


def arguments(training: Training, context: int, validation_windows: int, directory: Path) -> TrainingArguments:
    """transformers' arguments for a recipe, for the number of processes that torchrun started."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        training.tokens >= training.batch * context,
        f"training.tokens {training.tokens} are less than one step of training.batch {training.batch} windows of data.context "
        f"{context}",
    )
    require(
        not training.fsdp or "LOCAL_RANK" in os.environ,
        "training.fsdp: shards over the processes of torchrun, and this is none: torchrun --standalone --nproc-per-node GPUS -m "
        "flashsfa.cli train ...",
    )
    share, rest = divmod(training.batch, processes)
    require(rest == 0, f"training.batch {training.batch} must be a multiple of the {processes} processes")
    micro = training.micro_batch or share
    require(
        share % micro == 0,
        f"training.batch {training.batch} must be a multiple of training.micro_batch {micro} times {processes} processes",
    )
    evaluated = micro
    if processes > 1:  # a batch that is not full is filled up with windows of before, which must not count again
        evaluated = max(size for size in range(1, micro + 1) if validation_windows % size == 0)
    return TrainingArguments(
        output_dir=str(directory), max_steps=total_steps(training, context), seed=training.seed,
        per_device_train_batch_size=micro, per_device_eval_batch_size=evaluated, gradient_accumulation_steps=share // micro,
        learning_rate=training.learning_rate, weight_decay=training.weight_decay, adam_beta1=0.9, adam_beta2=0.95,
        max_grad_norm=training.clip, warmup_steps=training.warmup, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, bf16=training.precision == "bf16", use_cpu=not torch.cuda.is_available(),
        torch_compile=training.compile, accelerator_config={"non_blocking": True},  # else each batch waits for the step before
        fsdp=True if training.fsdp else None, ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are the same in every process, or its own
        train_sampling_strategy="sequential",  # the data has an order of its own
        remove_unused_columns=False, prediction_loss_only=True, label_names=["labels"],
        logging_steps=training.log_every, logging_first_step=True, logging_nan_inf_filter=False,
        save_strategy="steps", save_steps=training.save_every, eval_strategy="steps", eval_steps=training.evaluate_every,
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
    )  # fmt: skip


def bounded_exp(loss: float) -> float:
    """The perplexity of a mean loss, infinity where it is past all floats."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


def curves_folder(directory: Path) -> Path | None:
    """Where in a run's directory the newest curves for TensorBoard lie; None if none were written."""
    files = sorted(directory.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    return files[-1].parent if files else None


def total_steps(training: Training, context: int) -> int:
    """Steps of a run, rounded up."""
    return -(-training.tokens // (training.batch * context))


def fit(trainer: RunTrainer, place: RunDirectory) -> dict[str, Any]:
    """Train, from the newest checkpoint on if there is one, and evaluate; returns the figures of `result.json`."""
    if trainer.args.should_save:
        place.open()
    trainer.accelerator.wait_for_everyone()
    steps, warmup = trainer.args.max_steps, trainer.args.warmup_steps
    if warmup >= steps and trainer.args.should_save:
        _log.warning(
            "training.warmup: the learning rate rises for %d steps, and this run has %d: it ends below it",
            warmup,
            steps,
        )
    checkpoint = place.checkpoint
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # transformers evaluates after the last step, and a checkpoint of it has that in its history
        validation = next(row["eval_loss"] for row in reversed(trainer.state.log_history) if "eval_loss" in row)
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            raise ValueError("out of memory: lower training.micro_batch, or set training.checkpointing") from error
        raise
    return {
        "environment": environment(trainer.args.device),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.state.max_steps,
        "validation_loss": validation,
        "perplexity": bounded_exp(validation),
        "seconds_per_step": trainer.seconds_per_step,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "curve": trainer.state.log_history,
    }


def prepare(
    kind: type[RunTrainer], place: RunDirectory, model: Any, train: Dataset, validation: Dataset,
    collate: Callable[..., Any], training: Training, context: int, callbacks: Sequence[TrainerCallback], **options: Any,
) -> RunTrainer:  # fmt: skip
    """A Trainer of `kind`; nothing is written yet."""
    if training.checkpointing:
        # The new name of an old method; both recompute without re-entering autograd.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    windows: Any = validation
    return kind(
        place, model=model, args=arguments(training, context, len(windows), place.path), train_dataset=train,
        eval_dataset=validation, data_collator=collate, callbacks=list(callbacks), **options,
    )  # fmt: skip
