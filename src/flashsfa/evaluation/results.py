"""Figures on disk: one JSON an evaluation, with its settings and versions, under a name that is free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..benchmarking.results import environment, write_results


def document(evaluation: str, settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The frame of an evaluation's JSON; the figures are put under "results", variant by variant."""
    where = environment(device) | {"transformers": version("transformers")}
    return {"evaluation": evaluation, "settings": dict(settings), "environment": where, "results": {}}


def save(content: Mapping[str, Any], directory: Path, draw: Callable[[Path], None] | None = None) -> list[Path]:
    """Write `content` as JSON into `directory`, with a picture of the same name if `draw` makes one; returns the paths.

    Raises `OSError`, with neither left behind, if either cannot be written.
    """
    where = content["environment"]
    parts = [content["evaluation"], str(where["date"])[:10], where["commit"]]
    text = json.dumps(content, indent=1, default=str) + "\n"
    writers: dict[str, Callable[[Path], object]] = {".json": lambda path: path.write_text(text)}
    if draw is not None:
        writers[".png"] = draw
    return write_results(directory, "-".join(part for part in parts if part), writers)
