"""The table of models in docs/reference/support.md."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"


def assert_listed(models):
    """Each of `models`, by its name there, stands in the row of its default dense_dims."""
    section = PAGE.read_text().split("## Models of transformers")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    for name, dense_dims in models.items():
        default = "the rotary dims" if dense_dims else "0"
        assert any(name in models and kept.strip() == default for models, kept in rows), name
