"""What mkdocs does beside rendering: the reference of the command line, written from the parsers themselves."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from flashsfa.cli import parser as all_commands

PAGE = "reference/cli.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the page to those found in docs/."""
    files.append(File.generated(config, PAGE, content=page(all_commands())))
    return files


def page(parser: argparse.ArgumentParser) -> str:
    parts = [
        "# Command line",
        "Made from the parsers at build time: what `flashsfa COMMAND --help` prints. Every command ends with 0, with 2 and one line on stderr that "
        "says what to do, or with 130 when it is stopped; `bench` ends with 1 if a case failed.",
    ]
    return "\n\n".join([*parts, *_sections(parser)]) + "\n"


def _sections(parser: argparse.ArgumentParser, level: int = 2) -> Iterator[str]:
    """A section for `parser` if it runs something, and those of its commands."""
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not commands:
        yield f"{'#' * level} `{parser.prog}`"
        yield f"```\n{_usage(parser)}\n```"
        rows = [_row(parser, action) for action in parser._actions if action.dest != "help"]
        yield "\n".join(["| argument | default | |", "| --- | --- | --- |", *rows])
    for action in commands:
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        for name, command in action.choices.items():
            sections = _sections(command, level)
            yield next(sections)
            if not any(isinstance(x, argparse._SubParsersAction) for x in command._actions):
                yield f"{helps[name][0].upper()}{helps[name][1:]}."
            yield from sections


def _usage(parser: argparse.ArgumentParser) -> str:
    words = re.sub(r"\s+", " ", parser.format_usage()).removeprefix("usage: ").strip()
    return textwrap.fill(words, 88, subsequent_indent="    ", break_on_hyphens=False)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    if action.choices:
        value = " {" + ",".join(map(str, action.choices)) + "}"
    else:
        value = f" {action.metavar}" if action.option_strings and action.metavar else ""
    names = (
        ", ".join(action.option_strings) + value if action.option_strings else f"{action.metavar or action.dest}{value}"
    )
    default = "" if action.default in (None, False, argparse.SUPPRESS, [], ()) else f"`{action.default}`"
    if action.required and action.option_strings:
        default = "required"
    help = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{names}`", default, help)) + " |"
