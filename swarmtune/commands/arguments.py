"""Arguments of a verb: argparse, with its errors as one sentence."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from swarmtune.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are ``UsageError``; options and words may come in any order, and none is guessed from its beginning."""

    def __init__(self, verb: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"swarmtune {verb}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments among ``words``.

        Raises:
            UsageError: an unknown option, a missing argument or a wrong choice, with the nearest right one.
        """
        return self.parse_intermixed_args(list(words))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            close = difflib.get_close_matches(found[1].partition("=")[0], known, 1)
            what = f"there is no option {found[1]}" if found[1].startswith("-") else f"{found[1]!r} is one argument too many"
            message = what + (f"; did you mean {close[0]}?" if close else "")
        elif found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            choices = [choice.strip().strip("'") for choice in found[2].split(",")]
            close = difflib.get_close_matches(found[1], choices, 1)
            message = f"expected one of {', '.join(choices)}, got {found[1]!r}" + (f"; did you mean {close[0]}?" if close else "")
        raise UsageError(f"{self.prog.removeprefix('swarmtune ')}: {' '.join(message.split())} ({self.prog} --help says more)")
