"""A method changed for its next call only."""

import pytest

from lightning_qat.callback.patch_once import PatchOnce


class Owner:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def act(self, what: str) -> str:
        self.calls.append(what)
        return what.upper()


def test_one_call_is_changed_and_the_next_is_not() -> None:
    owner = Owner()
    PatchOnce(
        owner,
        "act",
        before=lambda what: owner.calls.append(f"before {what}"),
        after=lambda what: owner.calls.append(f"after {what}"),
    )
    assert [owner.act("one"), owner.act("two")] == ["ONE", "TWO"]
    assert owner.calls == ["before one", "one", "after one", "two"]
    assert "act" not in vars(owner)


def test_it_is_over_when_the_call_raises_and_when_it_is_undone() -> None:
    def refuse(what: str) -> None:
        raise ValueError(what)

    owner = Owner()
    PatchOnce(owner, "act", before=refuse)
    with pytest.raises(ValueError, match="one"):
        owner.act("one")
    call = PatchOnce(owner, "act", before=refuse)
    call.undo()
    call.undo()
    owner.act("two")
    assert owner.calls == ["two"]


def test_what_stood_on_the_object_itself_is_put_back() -> None:
    owner = Owner()
    own = lambda what: f"own {what}"  # noqa: E731 # a method that the user set on the object
    owner.act = own  # type: ignore[method-assign]
    PatchOnce(owner, "act", after=owner.calls.append)
    assert owner.act("one") == "own one"
    assert owner.act is own


def test_somebody_elses_method_is_left_alone() -> None:
    owner = Owner()
    call = PatchOnce(owner, "act")
    own = owner.act = str.lower  # type: ignore[method-assign, assignment]
    call.undo()
    assert owner.act is own
