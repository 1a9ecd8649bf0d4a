"""What prompts begin with, computed once: demonstrations before many queries."""

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import nn

from .episode import with_demonstrations
from .models.attention import Prefix
from .models.taps import device_of
from .tasks import Example
from .tokenizer import Tokenizer

MIN_TOKENS = 16  # a shorter beginning is not worth a pass of its own


@torch.no_grad()
def share_prefix(
    model: nn.Module,
    tokenizer: Tokenizer,
    demonstrations: list[list[Example]],
    queries: list[str],
) -> tuple[Callable, list[list[int]]]:
    """Compute once what all prompts begin with: the model with this prefix, and the rest of each prompt.

    The model stays as it is where prompts share fewer than `MIN_TOKENS` tokens. `demonstrations`: one list for all
    queries, or one a query.
    """
    texts = [
        with_demonstrations(examples, query)
        for examples, query in zip(cycle(demonstrations), queries)
    ]
    prompts = tokenizer.encode_all(texts)
    shared = common_beginning([prompt[:-1] for prompt in prompts])
    if shared < MIN_TOKENS:
        return model, prompts
    prefix = Prefix()
    beginning = torch.tensor([prompts[0][:shared]], device=device_of(model))
    model(beginning, logits=False, cache=prefix)
    return partial(model, prefix=prefix), [prompt[shared:] for prompt in prompts]


def common_beginning(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    shared = 0
    for tokens in zip(*prompts):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared
