"""The switches of quantizers: set for a model in one place, and each quantizer's own."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_qat import prepare
from lightning_qat.quantizers import ActivationQuantizer, WeightQuantizer
from lightning_qat.quantizers.factory import activation_quantizer
from lightning_qat.quantizers.switches import switch, switch_like
from lightning_qat.recipe.specs import ActivationSpec


def model() -> Any:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    prepare(net, {"joins": False, "outputs": False})
    return net


def test_every_quantizer_takes_the_switches_that_it_has() -> None:
    net = model()
    cache = object()
    switch(net, observing=False, quantizing=False, deferred=True, cache=cache)
    for module in net.modules():
        if isinstance(module, ActivationQuantizer):
            assert (module.observing, module.quantizing, module.deferred) == (False, False, True)
            assert not hasattr(module, "cache")
        if isinstance(module, WeightQuantizer):
            assert (module.quantizing, module.cache) == (False, cache)
            assert not hasattr(module, "observing")


def test_one_quantizer_can_be_switched_alone() -> None:
    net = model()
    net[0].input_quantizer.quantizing = False
    assert net[1].input_quantizer.quantizing
    twin = copy.deepcopy(net)
    switch(twin, quantizing=True)
    assert not net[0].input_quantizer.quantizing


def test_a_new_quantizer_takes_over_switches_and_not_the_mode() -> None:
    net = model().eval()
    switch(net, observing=False, deferred=True, compact=True)
    new = activation_quantizer(ActivationSpec(quantizer="learned"))
    switch_like(new, net[0].input_quantizer)
    assert (new.training, new.observing, new.deferred, new.compact) == (True, False, True, True)
    assert new.quantizing


def test_no_switch_is_in_the_state_dict() -> None:
    net = model()
    before = net.state_dict()
    switch(net, observing=False, quantizing=False, deferred=True, compact=True)
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k])
        if isinstance(after[k], torch.Tensor)
        else before[k] == after[k]
        for k in after
    )
