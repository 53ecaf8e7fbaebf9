import logging
from collections.abc import Iterator

import pytest

from swarmtune.notices import printable, show_warnings


@pytest.fixture
def shown() -> Iterator[None]:
    logger = logging.getLogger("swarmtune")
    handlers, propagate = list(logger.handlers), logger.propagate
    show_warnings()
    show_warnings()
    yield
    logger.handlers, logger.propagate = handlers, propagate


def test_a_warning_is_one_line_on_standard_error_without_control_characters(shown: None, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("swarmtune.remote.route").warning("peer %s said\n\x1b[31mred", "x")
    logging.getLogger("swarmtune.remote.route").info("quiet")
    assert capsys.readouterr() == ("", "swarmtune: warning: peer x said  [31mred\n")


def test_what_cannot_be_printed_is_replaced_and_what_is_long_is_cut() -> None:
    assert printable("a\x1b]0;title\x07\u202eb\x9bc\r\n") == "a ]0;title  b c  "
    assert printable("x" * 20, 10) == "x" * 9 + "…"
    assert printable("naïve 模型 …") == "naïve 模型 …"
