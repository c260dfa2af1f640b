"""DeiT image classifiers: ViT with a distillation token."""

import dataclasses

from lrquant.architectures import vit

ARCHITECTURE = dataclasses.replace(
    vit.ARCHITECTURE, name="deit", model_types=("deit",), blocks="deit.layers"
)
