"""SmolVLM and Idefics3: a SigLIP tower, pixel shuffle, a LLaMA."""

from lrquant.architectures.multimodal import multimodal

ARCHITECTURE = multimodal(
    name="smolvlm",
    model_types=("smolvlm", "idefics3"),
    blocks="model.text_model.layers",
    tower="model.vision_model",
)
