"""The tiny language model that the tests of commands share."""

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a dense model, to be read."""
    from words_model import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path):
    import random

    from words_model import WORDS

    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=300)))
    return path
