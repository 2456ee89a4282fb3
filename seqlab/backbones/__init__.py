"""Backbones: (b l d_model) to (b l d_model). `build_backbone` makes the one a config describes."""

from torch import nn

from seqlab.backbones.bidirectional import BidirectionalMamba
from seqlab.backbones.mamba import BackboneConfig, Mamba
from seqlab.backbones.unet import UNet


def build_backbone(config: BackboneConfig) -> nn.Module:
    """The backbone of a config: Mamba, BidirectionalMamba or UNet."""
    if config.architecture == "unet":
        return UNet(config)
    return Mamba(config) if config.direction == "causal" else BidirectionalMamba(config)
