"""Keeping one library's remarks away from the user."""

import logging
import warnings

import pytest

from lightning_qat_exporters.quiet import without_remarks


def test_remarks_of_the_library_are_dropped_and_its_errors_pass(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    child = logging.getLogger("noisy.part")
    with without_remarks("noisy", [("old .*", FutureWarning)], prints=True):
        child.warning("a remark")
        child.error("an error")
        logging.getLogger("other").warning("of another library")
        warnings.warn("old thing", FutureWarning, stacklevel=1)
        print("talk")
    child.warning("afterwards")
    assert caplog.messages == ["an error", "of another library", "afterwards"]
    assert capsys.readouterr().out == ""


def test_the_library_s_own_handlers_get_no_remarks(caplog: pytest.LogCaptureFixture) -> None:
    own, talkative = logging.getLogger("noisy"), logging.getLogger("noisy.talkative")
    talkative.setLevel(logging.DEBUG)
    own.addHandler(caplog.handler)
    try:
        with without_remarks("noisy"):
            logging.getLogger("noisy.part").warning("a remark")
        assert caplog.messages == []
    finally:
        own.removeHandler(caplog.handler)
    with without_remarks("noisy"):
        talkative.info("of a child with a level of its own")
    assert caplog.messages == []
    assert own.level == logging.NOTSET


def test_a_handler_that_the_library_puts_on_the_root_logger_is_removed() -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    with without_remarks("noisy"):
        root.addHandler(logging.NullHandler())
    assert root.handlers == before
    assert (logging.getLogger("noisy").handlers, logging.getLogger("noisy").propagate) == ([], True)


def test_other_warnings_pass() -> None:
    with pytest.warns(UserWarning, match="mine"), without_remarks("noisy"):
        warnings.warn("mine", UserWarning, stacklevel=1)
