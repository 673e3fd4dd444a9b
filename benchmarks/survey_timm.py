"""The families of timm for the survey: of every module of its models the variant with the fewest parameters.

Families are the modules `timm.models.*` that register models; the table was made with timm 1.0.31 (giant variants left
out beforehand). Each variant is run at the smallest input that it takes and at which no map shrinks to one position.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2


@dataclass(frozen=True)
class Variant:
    """The smallest model of a family.

    Attributes:
        name: As timm registers it.
        size: Height and width of the input in pixels.
        resized: Whether the model must be built for that size.
    """

    name: str
    size: int
    resized: bool = False


V = Variant
FAMILIES: dict[str, Variant] = {
    "beit": V("beit_base_patch16_224", 64, resized=True),
    "byoanet": V("halonet_h1", 256),
    "byobnet": V("test_byobnet", 64),
    "cait": V("cait_xxs24_224", 64, resized=True),
    "coat": V("coat_tiny", 64, resized=True),
    "convit": V("convit_tiny", 64, resized=True),
    "convmixer": V("convmixer_768_32", 64),
    "convnext": V("test_convnext", 64),
    "cpubone": V("cpubone_nano", 64),
    "crossvit": V("crossvit_tiny_240", 64),
    "csatv2": V("csatv2", 128),
    "cspnet": V("cs3darknet_focus_s", 64),
    "cspnext": V("cspnext_tiny", 64),
    "davit": V("davit_tiny", 64),
    "deepseek_vit": V("deepseek_vit_412m", 56),
    "deit": V("deit_tiny_patch16_224", 64, resized=True),
    "densenet": V("densenet121", 64),
    "dla": V("dla46x_c", 64),
    "dpn": V("dpn48b", 64),
    "edgenext": V("edgenext_xx_small", 64),
    "efficientformer": V("efficientformer_l1", 224),
    "efficientformer_v2": V("efficientformerv2_s0", 64, resized=True),
    "efficientnet": V("test_efficientnet", 64),
    "efficientvim": V("efficientvim_m1", 64),
    "efficientvit_mit": V("efficientvit_b0", 64),
    "efficientvit_msra": V("efficientvit_m0", 64),
    "eva": V("vit_tiny_patch16_dinov3_qkvb", 64),
    "fasternet": V("fasternet_t0", 64),
    "fastvit": V("fastvit_t8", 64),
    "focalnet": V("focalnet_tiny_srf", 64),
    "gcvit": V("gcvit_xxtiny", 64, resized=True),
    "gemma4_vit": V("gemma4_vit_167m", 64),
    "ghostnet": V("ghostnet_050", 64),
    "hardcorenas": V("hardcorenas_b", 64),
    "hgnet": V("hgnetv2_b0", 64),
    "hiera": V("hiera_tiny_224", 64, resized=True),
    "hieradet_sam2": V("sam2_hiera_tiny", 64),
    "hrnet": V("hrnet_w18_small", 64),
    "iformer": V("iformer_t", 64),
    "inception_next": V("inception_next_atto", 64),
    "inception_resnet_v2": V("ens_adv_inception_resnet_v2", 96),
    "inception_v3": V("adv_inception_v3", 96),
    "inception_v4": V("inception_v4", 96),
    "lcnetv2": V("lcnetv2_small", 64),
    "levit": V("levit_128s", 128, resized=True),
    "lowformer": V("lowformer_b0", 64),
    "mambaout": V("test_mambaout", 64),
    "maxxvit": V("test_coatnet", 64, resized=True),
    "metaformer": V("poolformerv2_s12", 64),
    "mlp_mixer": V("gmlp_ti16_224", 64, resized=True),
    "mobilenetv3": V("mobilenetv3_small_050", 64),
    "mobilenetv5": V("mobilenetv5_base", 64),
    "mobilevit": V("mobilevit_xxs", 128),
    "mvitv2": V("mvitv2_tiny", 64),
    "naflexvit": V("naflexvit_base_patch16_parfac_gap", 64),
    "nasnet": V("nasnetalarge", 64),
    "nest": V("jx_nest_tiny", 64, resized=True),
    "nextvit": V("nextvit_small", 64),
    "nfnet": V("test_nfnet", 64),
    "pit": V("pit_ti_224", 64, resized=True),
    "pnasnet": V("pnasnet5large", 64),
    "pvt_v2": V("pvt_v2_b0", 64),
    "qwen3_vit": V("qwen3_vit_88m", 64),
    "rdnet": V("rdnet_tiny", 64),
    "regnet": V("regnetx_002", 64),
    "repghost": V("repghostnet_050", 64),
    "repvit": V("repvit_m1", 64),
    "res2net": V("res2next50", 64),
    "resnest": V("resnest14d", 64),
    "resnet": V("test_resnet", 64),
    "resnetv2": V("resnetv2_18", 64),
    "rexnet": V("rexnet_100", 64),
    "selecsls": V("selecsls42", 64),
    "senet": V("legacy_seresnet18", 64),
    "sequencer": V("sequencer2d_s", 64),
    "shvit": V("shvit_s1", 128),
    "sknet": V("skresnet18", 64),
    "starnet": V("starnet_s050", 64),
    "swiftformer": V("swiftformer_xs", 64),
    "swin_transformer": V("swin_tiny_patch4_window7_224", 64, resized=True),
    "swin_transformer_v2": V("swinv2_tiny_window16_256", 64, resized=True),
    "swin_transformer_v2_cr": V("swinv2_cr_tiny_224", 64, resized=True),
    "tiny_vit": V("tiny_vit_5m_224", 64),
    "tnt": V("tnt_s_legacy_patch16_224", 64, resized=True),
    "tresnet": V("tresnet_m", 64),
    "twins": V("twins_svt_small", 64),
    "vgg": V("vgg11", 64),
    "visformer": V("visformer_tiny", 64, resized=True),
    "vision_transformer": V("test_vit", 64),
    "vision_transformer_hybrid": V("vit_tiny_r_s16_p8_224", 64, resized=True),
    "vision_transformer_relpos": V("test_vit_relpos", 64, resized=True),
    "vision_transformer_sam": V("samvit_base_patch16_224", 64),
    "vitamin": V("vitamin_small_224", 64, resized=True),
    "volo": V("volo_d1_224", 64, resized=True),
    "vovnet": V("ese_vovnet19b_slim_dw", 64),
    "xception": V("legacy_xception", 64),
    "xception_aligned": V("xception41p", 64),
    "xcit": V("xcit_nano_12_p8_224", 64),
}
QUICK = ("efficientnet", "resnet", "vision_transformer", "maxxvit")


def names() -> list[str]:
    """List the families."""
    return list(FAMILIES)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Build the smallest model of a family with random weights, and its example input."""
    timm = importlib.import_module("timm")
    variant = FAMILIES[name]
    options: dict[str, Any] = {"img_size": variant.size} if variant.resized else {}
    model = timm.create_model(variant.name, pretrained=False, **options)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(BATCH, 3, variant.size, variant.size, generator=generator)
