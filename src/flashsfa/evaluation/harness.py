"""The tasks of EleutherAI's lm-eval, on a model that is in memory already, dense or switched."""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import require
from ..extras import install_hint

_LONGEST_REASON = 400  # characters


class Harness:
    """lm-eval's tasks of some names.

    Tasks in `include_path` come first; lm-eval's own, whose data sets are downloaded, are looked through only for names
    that are not there.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: folder with task files (.yaml) of one's own.

    Raises `ImportError` without lm-eval, `ValueError` for a name that no task has, or a task whose file or data are not there or
    damaged.
    """

    def __init__(self, tasks: Sequence[str], include_path: Path | None = None) -> None:
        try:
            import datasets
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(f"{error}: {install_hint('eval')}") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about how it is called here
        datasets.disable_progress_bars()
        require(bool(tasks), "no task is named: give --tasks, by commas")
        require(include_path is None or include_path.is_dir(), f"--include-path {include_path} is no folder")
        self._tasks = list(tasks)
        folder = None if include_path is None else str(include_path)
        with _refusal(f"lm-eval cannot read the task files in {folder}"):
            self._manager: Any = TaskManager(include_path=folder, include_defaults=False)
        if self._unknown():
            with _refusal("lm-eval cannot read its task files"):
                self._manager = TaskManager(include_path=folder)
        unknown = self._unknown()
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._manager.all_tasks)
            raise ValueError(
                f"lm-eval has no task {', '.join(unknown)}" + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        with _refusal(f"lm-eval cannot load {', '.join(tasks)}"):
            # With their data: what is missing shows before any model is loaded.
            load = getattr(self._manager, "load", None) or self._manager.load_task_or_group  # as older versions call it
            load(self._tasks)

    def evaluate(
        self, model: Any, tokenizer: Any, *, batch_size: int, limit: int | None, num_fewshot: int | None
    ) -> dict[str, Any]:
        """lm-eval's figures: {"results": {task: {metric: value}}, "configs", "versions", "n-shot", "n-samples"}.

        Args:
            limit: examples a task; None for all.
            num_fewshot: worked examples in a prompt; None for what the task says.

        Raises what a task's own code or templates raise.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        out = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=self._tasks, task_manager=self._manager, limit=limit, num_fewshot=num_fewshot, log_samples=False,
        )  # fmt: skip
        return {name: out[name] for name in ("results", "configs", "versions", "n-shot", "n-samples")}

    def _unknown(self) -> list[str]:
        known = set(self._manager.all_tasks)
        return [name for name in self._tasks if name not in known]


@contextmanager
def _refusal(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block, where lm-eval reads files that are not ours, is a `ValueError` that begins with `what`."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"{what}: {type(error).__name__}: {reason}") from error
