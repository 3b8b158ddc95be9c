"""Generate after a long context, dense and with Sparse Feature Attention: bytes of the KV cache, and tokens a second.

    python examples/generate_long_context.py                                        # a tiny model with random weights
    python examples/generate_long_context.py Qwen/Qwen3-0.6B --context 32768        # a checkpoint: name or directory

A checkpoint reads Python's help texts, and its basis is calibrated on the start of them. It runs on a GPU if there is one.
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import flashsfa
from flashsfa.huggingface import attention_shape, cache_nbytes

CALIBRATION_TOKENS, WINDOW, CHUNK = 8192, 1024, 4096


class Clock:
    """A streamer that notes when the prompt went in and when each token came out."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def tiny_model(context):
    """A model of transformers with random weights, and a random prompt [1, context]."""
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=2 * context, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), torch.randint(1, 512, (1, context)), None


def checkpoint(name, context):
    """A checkpoint, and a prompt [1, context] of real text."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt")["input_ids"][:, :context]
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), ids, tokenizer


def generate(name, model, ids, tokens):
    """Prints a line; returns the bytes of the cache and the tokens."""
    model.generate(ids[:, :64], max_new_tokens=4, do_sample=False)  # kernels are compiled on their first use
    clock = Clock()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
        streamer=clock, prefill_chunk_size=CHUNK, return_dict_in_generate=True,
    )  # fmt: skip
    prompt, first, *_, last = clock.times
    rate, nbytes = (len(clock.times) - 2) / (last - first), cache_nbytes(out.past_key_values)["total"]
    print(f"{name:<6} KV cache {nbytes / 2**20:8.1f} MiB, first token {first - prompt:6.2f} s, {rate:6.1f} tokens/s")
    return nbytes, out.sequences[0, ids.shape[1] :]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint's name or directory (default: a tiny random model)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate, at least 3")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids, tokenizer = (
        tiny_model(options.context) if options.model is None else checkpoint(options.model, options.context)
    )
    model, ids = model.to(device).eval(), ids.to(device)

    dense_bytes, dense = generate("dense", model, ids, options.tokens)

    _, _, head_dim = attention_shape(model)
    budgets = {"topk": head_dim // 8, "dense_dims": head_dim // 8}
    basis = None
    if tokenizer is not None:  # a checkpoint has its positions all over the head: find better coordinates
        text = tokenizer("\n".join(topics.values()), return_tensors="pt")["input_ids"][0, :CALIBRATION_TOKENS]
        windows = text.unfold(0, WINDOW, WINDOW).to(device)
        basis = flashsfa.calibrate(model, windows, **budgets, max_position=max(WINDOW, options.context))
    flashsfa.enable(model, topk_query=head_dim, basis=basis, **budgets)  # dense queries cost no cache
    sparse_bytes, sparse = generate("sparse", model, ids, options.tokens)

    print(f"the sparse cache takes {1 - sparse_bytes / dense_bytes:.0%} less")
    if tokenizer is not None:
        for name, found in (("dense", dense), ("sparse", sparse)):
            print(f"{name}: {tokenizer.decode(found)!r}")


if __name__ == "__main__":
    main()
