"""Recomputed BatchNorm statistics equal those of torch.optim.swa_utils.update_bn, and dropout stays off."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg.objective import batchnorm


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.Flatten(), nn.BatchNorm1d(108))


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(50, 1, 8, 8) * 3 + 1), batch_size=16)


def test_recompute_is_bitwise_equal_to_update_bn():
    ours, reference = network().eval(), network()
    reference.load_state_dict(ours.state_dict())
    update_bn(loader(), reference)

    def forward() -> None:
        for (images,) in loader():
            ours(images)

    ours.train()(torch.randn(4, 1, 8, 8))  # start from other statistics
    ours.eval()
    batchnorm.recompute(batchnorm.layers(ours), forward)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in reference.state_dict().items())
    assert [layer.momentum for layer in batchnorm.layers(ours).values()] == [0.3, 0.1]
    assert not any(module.training for module in ours.modules())


def test_dropout_stays_off_while_batchnorm_uses_batch_statistics():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2)).eval()
    batch = torch.randn(8, 2) * 5
    with batchnorm.batch_statistics(batchnorm.layers(model)):
        assert not model[0].training
        torch.testing.assert_close(model(batch).mean(dim=0), torch.zeros(2), rtol=0, atol=1e-6)


def test_forward_is_not_called_for_a_model_without_batchnorm():
    def forward() -> None:
        raise AssertionError("was run")

    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        batchnorm.recompute(batchnorm.layers(model), forward)


def test_statistics_are_the_state_dict_names_of_running_means_and_variances():
    expected = {name for name in network().state_dict() if name.endswith(("running_mean", "running_var"))}
    assert batchnorm.statistics(network()) == expected
    assert batchnorm.statistics(copy.deepcopy(nn.BatchNorm1d(2))) == {"running_mean", "running_var"}
