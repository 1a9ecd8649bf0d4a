"""A model family of one's own: Llama with another activation in its MLP, read from a checkpoint folder as any other.

It derives from `llama.Llama`, which makes its layers with the class `block`.
"""

import torch.nn.functional as F
from ia2mini.models import config, llama


class GeluMLP(llama.MLP):
    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GeluBlock(llama.Block):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.mlp = GeluMLP(config)


class GeluLlama(llama.Llama):
    block = GeluBlock


# config.json then says "model_type": "gelu-llama"; its attention outputs are tapped as Llama's are
config.FAMILIES["gelu-llama"] = (llama.Config, GeluLlama)
