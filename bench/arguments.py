"""Types of command line arguments, whose errors say what would be right."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from .records import Results


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """An argument type: one of the names, in whatever case."""

    def choose(text: str) -> str:
        by_case = {name.lower(): name for name in names}
        if text.lower() in by_case:
            return by_case[text.lower()]
        nearest = difflib.get_close_matches(text.lower(), by_case, n=1, cutoff=0)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not known; did you mean {by_case[nearest[0]]}?"
        )

    return choose


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number with a lower bound."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return whole


def existing(text: str) -> Path:
    """An argument type: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def saved(text: str) -> tuple[Results, Path]:
    """An argument type: results of a run, and where they are."""
    try:
        return Results.load(existing(text)), Path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
