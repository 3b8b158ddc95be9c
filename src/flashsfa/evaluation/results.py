"""Figures on disk: one JSON an evaluation, with its settings and versions, under a name that is free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..benchmarking.results import all_or_none, environment, free_json, require_place

__all__ = ["document", "require_place", "save"]


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
    directory.mkdir(parents=True, exist_ok=True)
    target = free_json(directory, "-".join(part for part in parts if part))
    paths = [target] if draw is None else [target, target.with_suffix(".png")]
    with all_or_none(paths):
        target.write_text(json.dumps(content, indent=1, default=str) + "\n")
        if draw is not None:
            draw(paths[-1])
    return paths
