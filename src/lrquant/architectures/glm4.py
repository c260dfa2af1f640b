"""GLM-4-0414: GLM with norms after the sublayers too, which feed the residual and stay."""

import dataclasses

from lrquant.architectures import glm

ARCHITECTURE = dataclasses.replace(glm.ARCHITECTURE, name="glm4", model_types=("glm4",))
