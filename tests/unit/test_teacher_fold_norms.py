"""Folding batch norms into convolutions changes no feature and leaves nothing behind."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from teachers import TimmTeacher
from teachers.fold_norms import fold_batch_norms


def with_statistics(name: str) -> nn.Module:
    """A model whose batch norms do something: random statistics, scales and shifts."""
    model = timm.create_model(name, num_classes=0).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.weight, 0.5)):
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "tf_efficientnet_lite0", "tiny_vit_5m_224"])
def test_a_folded_model_gives_the_same_features(name: str) -> None:
    model = with_statistics(name)
    size = 224 if "vit" in name else 96
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
        got = fold_batch_norms(model).forward_intermediates(images, intermediates_only=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "tf_efficientnet_lite0"])
def test_no_batch_norm_is_left_on_the_way_to_the_features(name: str) -> None:
    folded = fold_batch_norms(with_statistics(name))
    run: list[nn.Module] = []
    for module in folded.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, output: run.append(module))
    folded.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    assert not run


def test_a_norm_that_is_not_behind_a_convolution_stays() -> None:
    model = with_statistics("test_efficientnet")
    model.bn1 = nn.Sequential(model.bn1, nn.BatchNorm2d(model.bn1.num_features).eval())
    folded = fold_batch_norms(model)
    assert not isinstance(folded.bn1[0], nn.BatchNorm2d)
    assert isinstance(folded.bn1[1], nn.BatchNorm2d)


def test_the_original_is_left_as_it_is() -> None:
    model = with_statistics("test_efficientnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fold_batch_norms(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_convolution_whose_output_is_also_read_elsewhere_is_not_folded() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.fill_(3.0)

        def forward_intermediates(self, image: torch.Tensor, **options: bool) -> list[torch.Tensor]:
            raw = self.conv(image)
            return [raw, self.norm(raw)]

    model = Forked().eval()
    assert fold_batch_norms(model) is model


def test_a_teacher_folds_its_norms() -> None:
    teacher = TimmTeacher("test_efficientnet", weights="random")
    teacher.load_weights()
    assert not isinstance(teacher.model.bn1, nn.BatchNorm2d)
