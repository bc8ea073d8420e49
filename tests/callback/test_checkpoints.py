"""Checkpoints of QAT runs and of float runs, with the callback and without it."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_qat import ActivationSpec, QATCallback, Recipe, load_qat_checkpoint, strip_quantizers
from lightning_qat.layers import LinearQAT
from tests.callback.tiny import BATCHES, SHORT, Net, loader, qat, same


def test_validating_a_fresh_module_with_a_checkpoint_equals_validating_live(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer(qat())
    net = Net()
    run.fit(net, loader())
    live = run.validate(net, loader(seed=1), verbose=False)
    run.save_checkpoint(tmp_path / "qat.ckpt")
    fresh = trainer(qat()).validate(
        Net(), loader(seed=1), ckpt_path=tmp_path / "qat.ckpt", verbose=False
    )
    assert fresh == live


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_loads_without_the_callback(
    trainer: Callable[..., L.Trainer], tmp_path: Path, weights_only: bool
) -> None:
    run = trainer(qat({"weight": {"bits": 4}}))
    net = Net()
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "qat.ckpt", weights_only=weights_only)
    # Only primitives and tensors: the safe loader reads it.
    torch.load(tmp_path / "qat.ckpt", weights_only=True)
    loaded = load_qat_checkpoint(Net, tmp_path / "qat.ckpt")
    assert type(loaded) is Net
    assert loaded.conv.weight_quantizer.spec.bits == 4  # type: ignore[union-attr]
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(loaded.eval()(x), net.eval()(x))


def test_another_recipe_than_the_checkpoints_is_named_key_by_key(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer(qat("int8"))
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "qat.ckpt")
    with pytest.raises(
        MisconfigurationException,
        match=r"differs in weight.bits: checkpoint 8, callback 4. Use the recipe the checkpoint",
    ):
        trainer(qat({"weight": {"bits": 4}})).validate(
            Net(), loader(), ckpt_path=tmp_path / "qat.ckpt"
        )


def saved(trainer: Callable[..., L.Trainer], path: Path, recipe: Any = "int8") -> Net:
    """A QAT run's checkpoint at ``path``."""
    net, run = Net(), trainer(qat(recipe))
    run.fit(net, loader())
    run.save_checkpoint(path)
    return net


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same checkpoint, changed."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def checkpoint(trainer: Callable[..., L.Trainer], tmp_path: Path) -> Path:
    saved(trainer, tmp_path / "qat.ckpt")
    return tmp_path / "qat.ckpt"


def test_test_and_predict_of_a_fresh_module_equal_the_live_ones(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = saved(trainer, tmp_path / "qat.ckpt")
    live, fresh = trainer(qat()), trainer(qat())
    path = tmp_path / "qat.ckpt"
    tested = live.test(net, loader(seed=1), verbose=False)
    assert fresh.test(Net(), loader(seed=1), ckpt_path=path, verbose=False) == tested
    predicted = live.predict(net, loader(seed=1))
    assert same(fresh.predict(Net(), loader(seed=1), ckpt_path=path), predicted)
    # The module itself agrees: what was evaluated is the quantized network.
    assert same(predicted, [net.eval()(x).detach() for x, _ in loader(seed=1)])


def test_a_checkpoint_without_the_callback_fails_loudly(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"qat_joins"):
        trainer().validate(Net(), loader(), ckpt_path=checkpoint)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        Net.load_from_checkpoint(checkpoint)


@pytest.mark.filterwarnings("ignore:Found keys that are not in the model")
def test_the_float_weights_of_a_qat_checkpoint_load_into_a_float_module(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = saved(trainer, tmp_path / "qat.ckpt")
    plain = Net.load_from_checkpoint(tmp_path / "qat.ckpt", strict=False)
    assert type(plain.conv) is nn.Conv2d
    assert torch.equal(plain.conv.weight, net.conv.weight)


def test_a_float_checkpoint_is_evaluated_in_float_through_the_callback(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run, net = trainer(), Net()
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    wanted = run.validate(net, loader(seed=1), verbose=False)
    found = trainer(qat()).validate(
        Net(), loader(seed=1), ckpt_path=tmp_path / "float.ckpt", verbose=False
    )
    assert found == wanted


def test_fine_tuning_starts_from_the_weights_of_a_float_checkpoint(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run, net = trainer(), Net()
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    tuned = Net.load_from_checkpoint(tmp_path / "float.ckpt")
    before = tuned.head.weight.clone()
    trainer(qat(), limit_train_batches=3).fit(tuned, loader())
    assert not torch.equal(tuned.head.weight, before)
    assert isinstance(tuned.head, LinearQAT)


def test_resuming_a_float_run_with_the_callback_says_what_it_does(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer()
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    net = Net()
    with pytest.warns(UserWarning, match=r"goes on with its epochs.*Net.load_from_checkpoint"):
        trainer(qat(), max_epochs=4).fit(net, loader(), ckpt_path=tmp_path / "float.ckpt")
    assert len(net.losses) == 2 * BATCHES


def test_a_stripped_checkpoint_resumes_a_float_run(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = saved(trainer, tmp_path / "qat.ckpt")
    whole = torch.load(tmp_path / "qat.ckpt", weights_only=True)
    keys = set(whole["state_dict"])
    stripped = strip_quantizers(whole)
    assert set(whole["state_dict"]) == keys
    torch.save(stripped, tmp_path / "float.ckpt")
    assert set(stripped["state_dict"]) == set(Net().state_dict())
    plain = Net()
    trainer(max_epochs=3).fit(plain, loader(), ckpt_path=tmp_path / "float.ckpt")
    assert len(plain.losses) == BATCHES
    loaded = Net.load_from_checkpoint(tmp_path / "float.ckpt")
    assert torch.equal(loaded.conv.weight, net.conv.weight)
    with pytest.raises(ValueError, match="holds no quantizers, so there is nothing to strip"):
        strip_quantizers(stripped)


def test_every_difference_between_recipes_is_named(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    recipe = Recipe(exclude=("head",), joins=False, activation=ActivationSpec(symmetric=True))
    with pytest.raises(MisconfigurationException) as caught:
        trainer(qat(recipe)).fit(Net(), loader(), ckpt_path=checkpoint)
    message = str(caught.value)
    assert "activation.symmetric: checkpoint False, callback True" in message
    assert "exclude: checkpoint [], callback ['head']" in message
    assert "joins: checkpoint True, callback False" in message
    assert "weight" not in message.replace("float weights", "")
    assert "strip_quantizers(checkpoint)" in message


def test_another_recipe_than_a_weights_only_checkpoints_is_named_too(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer(qat({"weight": {"bits": 4}}))
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"conv.weight_quantizer: .*bits: checkpoint 4, model 8"):
        trainer(qat()).validate(Net(), loader(), ckpt_path=tmp_path / "weights.ckpt")


def newer(checkpoint: dict[str, Any]) -> None:
    checkpoint["callbacks"]["QATCallback"]["version"] = 2


def without_a_range(checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"]["head.input_quantizer.min_val"]


def without_a_quantizer(checkpoint: dict[str, Any]) -> None:
    weights = checkpoint["state_dict"]
    for key in [k for k in weights if k.startswith("conv.weight_quantizer.")]:
        del weights[key]


def without_a_join(checkpoint: dict[str, Any]) -> None:
    weights = checkpoint["state_dict"]
    for key in [k for k in weights if k.startswith("qat_joins.")]:
        del weights[key]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (newer, r"format version 1 or older; got 2. It was written by a newer lightning-qat"),
        (without_a_range, r"1 keys are missing: 'head.input_quantizer.min_val'. It was edited"),
        (without_a_quantizer, r"1 keys are missing: 'conv.weight_quantizer._extra_state'"),
        (without_a_join, r"4 keys are missing: 'qat_joins.mean_0_0._extra_state', 'qat_joins"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    trainer: Callable[..., L.Trainer], checkpoint: Path, change: Any, text: str
) -> None:
    path = edited(checkpoint, change)
    net = Net()
    with pytest.raises(MisconfigurationException, match=text):
        trainer(qat(), max_epochs=3).fit(net, loader(), ckpt_path=path)
    assert net.losses == []
    assert not {"configure_model", "on_load_checkpoint"} & set(vars(net))
    with pytest.raises(ValueError, match=text):
        load_qat_checkpoint(Net, path)


def test_a_truncated_checkpoint_is_named(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"qat.ckpt' must be a whole checkpoint; torch could not"):
        load_qat_checkpoint(Net, checkpoint)
    net = Net()
    with pytest.raises(ValueError, match=r"qat.ckpt' must be a whole checkpoint; torch could not"):
        trainer(qat(), max_epochs=3).fit(net, loader(), ckpt_path=checkpoint)
    assert net.losses == []
    assert not {"configure_model", "on_load_checkpoint"} & set(vars(net))


def test_a_module_that_loads_loosely_may_miss_quantizers(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    net = Net()
    net.strict_loading = False
    edited(checkpoint, without_a_quantizer)
    trainer(qat(), max_epochs=3).fit(net, loader(), ckpt_path=checkpoint)
    assert len(net.losses) == BATCHES


def test_hooks_of_the_users_own_still_run(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    class Hooked(Net):
        seen: tuple[str, ...] = ()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen += (f"epoch {checkpoint['epoch']}",)

        def configure_model(self) -> None:
            self.seen += ("configure",)

    net = Hooked()
    trainer(qat()).validate(net, loader(), ckpt_path=checkpoint, verbose=False)
    assert net.seen == ("configure", "epoch 2")
    assert not {"configure_model", "on_load_checkpoint"} & set(vars(net))


def test_a_subclass_of_the_callback_resumes_the_checkpoint_of_the_callback(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    class Own(QATCallback):
        pass

    callback = Own(schedule=SHORT)
    trainer(callback, max_epochs=3).fit(Net(), loader(), ckpt_path=checkpoint)
    assert callback.state_dict()["batches_seen"] == 3 * BATCHES


@dataclass
class Width:
    """A hyperparameter."""

    value: int = 4


def with_a_dataclass(checkpoint: dict[str, Any]) -> None:
    checkpoint["hyper_parameters"] = {"width": Width()}


def test_resuming_a_healthy_checkpoint_with_a_dataclass_says_what_to_pass(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    edited(checkpoint, with_a_dataclass)
    if "weights_only" not in signature(L.Trainer.fit).parameters:
        # Lightning before 2.6 trusts every checkpoint.
        run = trainer(qat(), max_epochs=3)
        run.fit(Net(), loader(), ckpt_path=checkpoint)
        assert run.current_epoch == 3
        return
    with pytest.raises(
        ValueError, match=r"is whole, but it holds .*Width.*pass weights_only=False"
    ):
        trainer(qat(), max_epochs=3).fit(Net(), loader(), ckpt_path=checkpoint, weights_only=True)
    run = trainer(qat(), max_epochs=3)
    run.fit(Net(), loader(), ckpt_path=checkpoint, weights_only=False)
    assert run.current_epoch == 3
    with torch.serialization.safe_globals([Width]):
        trainer(qat(), max_epochs=3).fit(Net(), loader(), ckpt_path=checkpoint, weights_only=True)


def without_batches(checkpoint: dict[str, Any]) -> None:
    del checkpoint["callbacks"]["QATCallback"]["batches_seen"]


def without_phase(checkpoint: dict[str, Any]) -> None:
    del checkpoint["callbacks"]["QATCallback"]["phase"]


def with_a_recipe_alone(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["callbacks"]["QATCallback"]
    checkpoint["callbacks"]["QATCallback"] = {name: state[name] for name in ("version", "recipe")}


def with_texts_for_weights(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["conv.weight"] = "weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_batches, "QATCallback: 'batches_seen' must be a count; got None"),
        (without_phase, "QATCallback: 'phase' must be a phase of the schedule; it is missing"),
        (with_texts_for_weights, "'conv.weight' in 'state_dict' must be a tensor; got str"),
    ],
)
def test_resuming_a_checkpoint_that_lacks_a_part_names_the_part(
    trainer: Callable[..., L.Trainer], checkpoint: Path, change: Any, text: str
) -> None:
    with pytest.raises(MisconfigurationException, match=text):
        trainer(qat(), max_epochs=3).fit(Net(), loader(), ckpt_path=edited(checkpoint, change))


def test_a_run_resumed_from_a_recipe_alone_calibrates(
    trainer: Callable[..., L.Trainer], checkpoint: Path
) -> None:
    run = trainer(qat(), max_epochs=3)
    run.fit(Net(), loader(), ckpt_path=edited(checkpoint, with_a_recipe_alone))
    assert run.current_epoch == 3
