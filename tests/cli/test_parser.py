"""All options of all commands."""

import argparse

import pytest

from flashsfa.cli import main, parser


def leaves(parser):
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in commands:
        for command in action.choices.values():
            yield from leaves(command)
    if not commands:
        yield parser


@pytest.mark.parametrize("command", list(leaves(parser())), ids=lambda command: command.prog)
def test_options_say_what_they_take_and_what_they_are(command):
    for action in command._actions:
        assert action.help
        assert action.nargs == 0 or action.metavar, action.dest
    assert "(default: None)" not in command.format_help()


@pytest.mark.parametrize("value", ["sparse", "1.5", ""])
def test_query_features_are_a_number_or_dense(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "-o", "out", "--topk-query", value])
    assert "is neither dense nor a whole number" in capsys.readouterr().err
