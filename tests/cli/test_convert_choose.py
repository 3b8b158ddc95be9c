"""`flashsfa convert` with limits and presets: what is chosen is written, and what nothing meets is refused."""

import functools
import json
import re

import pytest

import flashsfa
from flashsfa.cli import main
from flashsfa.presets import PRESETS

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
import flashsfa.choose  # noqa: E402
import flashsfa.convert  # noqa: E402
from words_model import assert_refused  # noqa: E402
from words_model import convert_arguments as arguments  # noqa: E402


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Times of one short context alone."""
    settings = functools.partial(flashsfa.convert.ConvertSettings, contexts=(64,))
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", settings)


def test_the_choice_is_written_with_the_frontier(tiny, text, tmp_path, capsys):
    output = tmp_path / "out"
    assert (
        main(arguments(tiny, text, output, "--max-loss", "50%", "--bytes", "60 %", "--recent", "2", "--first", "1"))
        == 0
    )
    assert {p.name for p in tmp_path.iterdir()} == {"out", "text.txt"}  # the measurements are gone
    report = json.loads((output / "report.json").read_text())
    rows, dense_bytes = report["variants"], 4 * 2 * 8
    able = {name: rows[name] for name in report["candidates"]}
    assert report["chosen"] == min(able, key=lambda name: (able[name]["token_bytes"], able[name]["loss"]))
    assert all(row["token_bytes"] <= 0.6 * dense_bytes for row in able.values())
    assert (report["settings"]["max_loss"], report["settings"]["max_bytes"]) == (0.5, 0.6)
    for name in ("report.png", "frontier.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "Chosen: the fewest bytes with a loss of at most 50 % and at most 60 % of the bytes" in out
    assert f"Written: {able[report['chosen']]['label']}, " in out
    assert "frontier.png are in" in out
    settings = flashsfa.from_pretrained(output).config.sfa
    assert (settings["recent"], settings["first"]) == (2, 1)
    assert (
        main(
            [
                "eval",
                "perplexity",
                str(output),
                "--text",
                str(text),
                "--dtype",
                "float32",
                "--window",
                "40",
                "-o",
                str(tmp_path / "r"),
            ]
        )
        == 0
    )


def test_what_nothing_meets_is_refused_with_the_nearest(tiny, text, tmp_path, capsys, monkeypatch):
    lost = {"loss": 0.1, "loss_error": 0.01, "share": 0.5}
    monkeypatch.setattr(flashsfa.choose, "_against", lambda row, dense: lost)
    before = set(tmp_path.iterdir())
    assert main(arguments(tiny, text, tmp_path / "a" / "out", "--max-loss", "1%")) == 2
    out, error = capsys.readouterr()
    kept = tmp_path / "a" / ".out.measured.json"  # for another try, with other limits
    assert [*(tmp_path / "a").iterdir()] == [kept]
    assert f"what was measured is kept in {kept}" in error
    assert len(re.findall(r"\+10\.00 ± 1\.00 %", out)) == 3
    (line,) = error.strip().splitlines()
    assert "nothing that was tried has a loss of at most 1 %; the nearest is" in line
    assert main(arguments(tiny, text, tmp_path / "a" / "out", "--max-loss", "20%")) == 0
    assert "measured before: dense" in capsys.readouterr().out
    assert not kept.exists()
    assert main(arguments(tiny, text, tmp_path / "out", "--bytes", "5%")) == 2
    out, error = capsys.readouterr()
    assert set(tmp_path.iterdir()) == before | {tmp_path / "a"}
    assert "not measured" in out
    assert "at most 5 % of the bytes" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-loss", "1%", "--key-bytes", "4"], "the choice says it: leave out --key-bytes"),
        (["--bytes", "25%", "--topk", "4"], "leave out --topk"),
        (["--bytes", "25%", "--cache-dtype", "int8"], "leave out --cache-dtype"),
        (["--bytes", "25%", "--cache-dtype", "int4"], "leave out --cache-dtype"),  # the default, but said
        (["--bytes", "25%", "--cache-dtype", "auto"], "leave out --cache-dtype"),
        (["--preset", "small", "--recent", "1"], "a preset says it: leave out --recent"),
        (["--preset", "half", "--cache-dtype", "int4"], "leave out --cache-dtype"),
        (
            ["--preset", "half", "--recent", "32", "--first", "4", "--prefill", "dense"],
            "leave out --recent, --first, --prefill",
        ),
        (["--preset", "small", "--max-loss", "1%"], "give one of them"),
        (["--bytes", "100%"], "over 0 % and under 100 %"),
        (["--max-loss", "100%"], "under 100 %"),
    ],
)
def test_two_ways_to_say_it(options, message, tiny, text, tmp_path, capsys):
    before = set(tmp_path.iterdir())
    assert_refused(capsys, arguments(tiny, text, tmp_path / "out", *options), message)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("share", ["1", "0.01", "%", "-1%", "1%%", "nan%", "one%"])
def test_shares_are_percents(share, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "-o", "out", f"--max-loss={share}"])
    assert stop.value.code == 2
    assert "is no share in percent such as 1%" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_timed_without_a_comparison(name, text, tmp_path, monkeypatch, capfd):
    from words_model import save_tiny

    timed = []  # caches, and prompts over codes

    def cache(**options):
        timed.append((options["recent"], options["first"]))
        return flashsfa.SparseKVCache(**options)

    def coded(*tensors, **options):
        timed.append("coded")
        return flashsfa.sparse_feature_attention(*tensors, **options)

    monkeypatch.setattr(flashsfa.convert, "SparseKVCache", cache)
    monkeypatch.setattr(flashsfa.convert, "sparse_feature_attention", coded)
    model, preset = save_tiny(tmp_path / "model", head_dim=16), PRESETS[name]
    assert main(arguments(model, text, tmp_path / "out", "--preset", name)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["variants"]) == 2
    assert ("calibrating" in "".join(capfd.readouterr())) == (preset.key_bytes is not None)
    assert set(timed) == {(preset.recent, preset.first), *(["coded"] if preset.prefill == "coded" else [])}
    settings = flashsfa.from_pretrained(tmp_path / "out").config.sfa
    for option in ("cache_dtype", "recent", "first", "prefill"):
        assert settings[option] == report["switched"][option] == getattr(preset, option)
        assert report["settings"][option] is None  # nothing was said
    if preset.key_bytes is None:
        assert (settings["dense_dims"], settings["topk"]) == (0, 16)
    else:
        row = report["variants"][report["chosen"]]
        assert f"{preset.key_bytes_of(16)} bytes a key" in row["label"]


@pytest.mark.parametrize(
    ("options", "said", "bits"),
    [
        ([], "--cache-dtype int4", 4),
        (["--topk", "2"], "--cache-dtype int4", 4),
        (["--cache-dtype", "d8s8v4"], "--cache-dtype d8s8v4", 4),
        (["--preset", "balanced"], "--preset balanced", 4),
        (["--preset", "small"], "--preset small", 3),
    ],
)
def test_heads_that_few_bits_do_not_hold(options, said, bits, tiny, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flashsfa.convert, "token_windows", None)  # refused before any work
    message = (
        f"{said} keeps values in {bits} bits, which goes with head sizes that are a multiple of 16; the model's is 8: "
        "take --cache-dtype int8 in its place"
    )
    assert_refused(capsys, arguments(tiny, text, tmp_path / "out", *options), message)


def test_presets_say_their_bytes():
    from flashsfa.formats import CodeFormat, cache_bits

    for preset in PRESETS.values():
        bits = cache_bits(preset.cache_dtype)
        values = bits.v_bytes(64) if isinstance(bits, CodeFormat) else 64 + 4
        assert preset.token_bytes == (preset.key_bytes_of(64) or 64 + 4) + values


def test_presets_and_the_dtype_of_shares_stand_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name, preset in PRESETS.items():
        assert f"{name}, {preset.purpose} ({preset.token_bytes}, {preset.loss})" in out
    assert "of the bytes that a dense key and value take in --dtype" in out
