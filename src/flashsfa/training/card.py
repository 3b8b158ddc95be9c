"""The model card of a trained model: how to load it, what it was trained on and how, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..files import write_whole
from ..huggingface.loading import read_config


def write_card(folder: Path, recipe: Any, result: Mapping[str, Any]) -> None:
    """Write README.md beside the weights in `folder`, as hubs of models show it.

    Args:
        recipe: what was trained, of pretraining or distillation.
        result: the figures of `result.json`.
    """
    import yaml

    is_sparse = "sfa" in read_config(folder)
    head = ModelCardData(
        library_name="transformers", license=recipe.license, tags=["sparse-feature-attention"] if is_sparse else None
    ).to_yaml()
    training, data, environment = recipe.training, recipe.data, result["environment"]
    tokens = result["steps"] * training.batch * data.context
    is_held_out = data.train != data.validation or data.train == "needle"  # whose prompts are drawn anew
    text = "held-out text" if is_held_out else "the text that was trained on"
    text += "" if result.get("as_kept", True) else ", no token exact, features in 16 bits"
    figures = {
        f"perplexity, {text}": f"{result['perplexity']:.4g}",
        f"loss, {text}": f"{result['validation_loss']:.4f}",
        "parameters": f"{result['parameters']:,}",
        "tokens of training": f"{tokens:,}",
        "context": f"{data.context:,}",
        "trained on": ", ".join(
            f"{name} {environment[key]}"
            for name, key in (("", "device"), ("torch", "torch"), ("flashsfa", "flashsfa"), ("commit", "commit"))
            if environment[key]
        ).strip(),
    }
    settings = {name: value for name, value in asdict(recipe).items() if name != "license"}
    for key in ("train", "validation"):  # a path says where the text lay, not what it is
        settings["data"][key] = Path(str(settings["data"][key])).name
    lines = [
        "---", head, "---", f"# {_title(recipe)}", "",
        "Sparse feature attention (arXiv 2603.22300): a cache keeps only the largest features of each key. FlashSFA loads and runs it."
        if is_sparse
        else "Dense attention, trained beside models with sparse features.",
        "", "```python", *_loading(is_sparse), "```", "", "| | |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in figures.items()),
        "", "## Recipe", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).rstrip(), "```", "",
    ]  # fmt: skip
    write_whole(folder / "README.md", "\n".join(lines))


def _title(recipe: Any) -> str:
    if isinstance(recipe.model, str):  # a converted model that was tuned
        return Path(recipe.model).name
    attention = recipe.attention
    return f"{recipe.model.architecture}, attention {attention.kind}" + (
        f", k={attention.topk}" if attention.topk else ""
    )


def _loading(is_sparse: bool) -> list[str]:
    if is_sparse:
        return ["import flashsfa", "", 'model = flashsfa.from_pretrained("FOLDER")']
    return [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ]
