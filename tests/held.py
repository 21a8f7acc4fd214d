"""What a stage holds for its weight gradients, counted on the tensors themselves."""

from __future__ import annotations

import torch

from megalite.config import Config
from megalite.models.llama import LlamaStage
from megalite.models.stage import StageSpec
from megalite.parallel.tensor import TensorGroup


def held_for_weights(config: Config, spec: StageSpec, tp: TensorGroup) -> int:
    """Bytes of the distinct storages left by the input gradient of one micro-batch, fp32."""
    stage = LlamaStage(config, spec, tp=tp, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(0.01)
    samples, length = config.train.micro_batch_size, config.model.seq_length
    if spec.has_embedding:
        out = stage(torch.zeros(samples, length, dtype=torch.long))
    else:
        out = stage(torch.ones(stage.hidden_shape(length, samples), requires_grad=True))
    with stage.weight_gradients.deferring(0):
        out.backward(torch.ones_like(out))
    products = stage.weight_gradients._deferred[0]
    storages = [t.untyped_storage() for product in products for t in (product.x, product.dy)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
