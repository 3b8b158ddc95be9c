"""What the options of several commands share: their values, their help, and how a dense model is switched."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..basis import KINDS, SHARED
from ..budget import DENSE
from ..checks import MOST_TOKENS, require_int
from ..formats import AUTO, NAMES, cache_bits
from ..presets import default_budget, default_key_bytes

PREFILLS = ("coded", "dense")
DTYPES = ("bfloat16", "float16", "float32")
HELP_TOPICS = "topics of Python's help"  # the text that is read where none is named


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_value = action.default not in (None, False, ()) and action.default != []
        return super()._get_help_string(action) if is_value else action.help


def _cache_dtype(name: str) -> str:
    if name != AUTO:
        try:
            cache_bits(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _cache_dtype_or_none(name: str) -> str | None:
    """None for auto: where that is the default, to say it is to say nothing."""
    return None if name == AUTO else _cache_dtype(name)


def some_text(text: str) -> str:
    """An option's value that is not empty, as that of a shell variable without a value."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text


def some_path(text: str) -> Path:
    """As `some_text`."""
    return Path(some_text(text))


def percents(text: str) -> float:
    """A share written in percent, as 1% or 12.5 %."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no share in percent such as 1%")
    return float(found[1]) / 100


def integers(text: str) -> list[int]:
    """Whole numbers by commas, sorted, each once."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 1,2,3") from None


def names(text: str) -> list[str]:
    """Names by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def require_counts(options: argparse.Namespace, **least: int) -> None:
    """Each of these options, where it is given as a number, is at least so much, and a number of things that there can be."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and value != DENSE:
            require_int(f"--{name.replace('_', '-')}", value, low, MOST_TOKENS)


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=some_text, metavar="NAME", help="directory or hub name, for a model that has none beside it"
    )


def add_output(parser: argparse.ArgumentParser, default: str = "results") -> None:
    parser.add_argument(
        "-o", "--output", type=some_path, default=Path(default), metavar="DIR", help="earlier results there are kept"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", metavar="DEVICE",
        help="cuda, cpu, or auto: cuda if there is one",
    )  # fmt: skip


def add_dtype(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", metavar="DTYPE", help=f"{_listed(DTYPES)}; {help}"
    )


def add_budget(
    parser: argparse._ActionsContainer,
    context: str,
    *,
    cache_dtype: str = AUTO,
    recent: int = 0,
    first: int = 0,
    prefill: str = "coded",
) -> None:
    """The options that say how a dense model is switched. It is calibrated for `context` where nothing else is said, and the others
    are what the command takes then: they stand in the help, and options that are not given are None."""
    small, large = default_budget(64), default_budget(128)
    parser.add_argument(
        "--key-bytes", type=int, metavar="N",
        help="bytes of a key, shared out once over the axes of a calibrated basis"
        + ("" if cache_dtype == AUTO else f" (default: as many as a dense key in 4 bits, {default_key_bytes(64)} at head size 64)"),
    )  # fmt: skip
    parser.add_argument(
        "--topk", type=int, metavar="K",
        help="in place of --key-bytes, kept features of a key beside the dense ones",
    )  # fmt: skip
    parser.add_argument(
        "--topk-query", type=_query_features, metavar="K",
        help="kept features of a query beside the dense ones; dense keeps all, and costs no cache (default: dense)",
    )  # fmt: skip
    parser.add_argument(
        "--dense-dims", type=int, metavar="M",
        help="leading features that are always kept, with --topk (default: by head size, "
        f"{small.dense_dims} of 64, {large.dense_dims} of 128)",
    )  # fmt: skip
    parser.add_argument(
        "--basis", choices=KINDS, metavar="KIND",
        help=f"calibrated coordinates, with --topk: {_listed(KINDS)} (default: dictionary for dense queries, balanced for sparse ones); "
        f"with --key-bytes: {_listed(SHARED)}, and then nothing else is tried (default: scaled, or whitened for a model without RoPE)",
    )  # fmt: skip
    parser.add_argument(
        "--max-position", type=int, metavar="N", help=f"longest context in tokens to calibrate for (default: {context})"
    )
    parser.add_argument(
        "--cache-dtype", metavar="DTYPE", type=_cache_dtype_or_none if cache_dtype == AUTO else _cache_dtype,
        help=f"of values, and of keys that are kept as features: {NAMES}; auto for that of --dtype (default: {cache_dtype})",
    )  # fmt: skip
    parser.add_argument(
        "--recent", type=int, metavar="N",
        help=f"newest tokens whose keys and values the cache keeps as they come (default: {recent})",
    )  # fmt: skip
    parser.add_argument(
        "--first", type=int, metavar="N", help=f"first tokens of a text that it keeps as they come (default: {first})"
    )  # fmt: skip
    parser.add_argument(
        "--prefill", choices=PREFILLS, metavar="HOW",
        help="what a prompt attends to: coded, the keys as they are cached, or dense, its own keys as they come "
        f"(default: {prefill})",
    )  # fmt: skip


def _query_features(text: str) -> int | str:
    if text == DENSE:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {DENSE} nor a whole number") from None


def _listed(values: tuple[str, ...]) -> str:
    return ", ".join(values[:-1]) + f" or {values[-1]}"
