"""Token files, recipes and converted models for the tests of training. Each is made once a session."""

import shutil

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """A token file with documents that end with token 0."""
    from tiny import VOCABULARY

    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    random = np.random.default_rng(0)
    ids = random.integers(1, VOCABULARY, 40)[np.arange(4000) % 37]
    ids[random.integers(0, 4000, 300)] = 0
    ids[7] = VOCABULARY - 1
    np.save(path, ids.astype(np.uint16))
    return path


@pytest.fixture
def content(tokens):
    """A recipe of five steps."""
    from tiny import CONTEXT, GPT2, VOCABULARY

    data = {
        "train": str(tokens),
        "validation": str(tokens),
        "context": CONTEXT,
        "separator": 0,
        "validation_windows": 8,
    }
    training = {"tokens": 5 * 4 * CONTEXT, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup": 1}
    training |= {"precision": "fp32", "save_every": 2, "evaluate_every": 5, "log_every": 1}
    model = {"architecture": "gpt2", "config": {**GPT2, "vocab_size": VOCABULARY}}
    return {"model": model, "attention": {"kind": "sfa", "topk": 4}, "data": data, "training": training}


@pytest.fixture(scope="session")
def converted_model(tmp_path_factory):
    """The directory of a converted model with a basis, to be read."""
    from tokenizers import Tokenizer, models

    import flashsfa
    from tiny import QWEN3, VOCABULARY, transformers

    path = tmp_path_factory.mktemp("models") / "converted"
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, **QWEN3
    )
    model = transformers.Qwen3ForCausalLM(config)
    basis = flashsfa.calibrate(model, torch.randint(0, VOCABULARY, (4, 32)), 3, dense_dims=2)
    flashsfa.enable(model, 3, topk_query=16, dense_dims=2, basis=basis).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(path)
    return path


@pytest.fixture
def converted(converted_model, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(converted_model, tmp_path / "converted")
