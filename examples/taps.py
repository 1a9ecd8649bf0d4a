"""Attention outputs of every layer, by a tap of ours and by a forward hook on transformers: the same numbers.

python examples/taps.py [CHECKPOINT FOLDER]
"""

import sys

import torch
import transformers
from ia2mini.models.checkpoint import locate

from ia2mini import Taps, load

folder = locate(sys.argv[1] if len(sys.argv) > 1 else "tiny")
model, tokenizer = load(folder)
ids = torch.tensor([tokenizer.encode("Text:the cast was bright near the trail\nLabel:")])  # [B, T]

# Ours: ask for them. Taps(at=(rows, cols), layers=[0, 2]) would record only those positions and layers.
taps = Taps()
logits = model(ids, taps=taps)  # [B, T, V]
# [L, B, T, D]: what each attention block adds to the residual stream, attached to the graph
ours = taps.stack()

# transformers: a hook on every attention module, to be removed again.
twin = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
caught = []
hooks = [
    layer.self_attn.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
    for layer in twin.model.layers
]
with torch.no_grad():
    their_logits = twin(ids).logits
for hook in hooks:
    hook.remove()

print(
    "attention outputs",
    list(ours.shape),
    "largest difference",
    (ours - torch.stack(caught)).abs().max().item(),
)
print(
    "logits", list(logits.shape), "largest difference", (logits - their_logits).abs().max().item()
)
