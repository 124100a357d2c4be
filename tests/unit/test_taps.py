"""Outputs of named layers, taken on a forward's way."""

import pytest
import torch
from torch import nn

from kd_core.networks import taps


def test_features_are_what_the_layers_give_and_the_hooks_are_gone() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    inputs = torch.randn(3, 4)
    with taps.features(net, ["0", "1.0"]) as taken:
        output = net(inputs)
    torch.testing.assert_close(taken["0"], net[0](inputs))
    torch.testing.assert_close(taken["1.0"], net[0](inputs).relu())
    torch.testing.assert_close(output, net(inputs))
    assert taken["0"].requires_grad
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_that_is_not_there_or_not_passed_is_named() -> None:
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 8)), "head": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match=r"ModuleDict has no layer '0'; it has body\.0"), taps.features(net, ["0"]):
        pass
    with pytest.raises(RuntimeError, match="no forward has passed the layer 'head'"), taps.features(net, ["head"]):
        net["body"](torch.randn(3, 4))
    assert not any(module._forward_hooks for module in net.modules())
