"""Scoring R adapted models on labelled rows (protocol section 5)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import Adapter, adapted
from .labels import Scoring, label_scores
from .metrics import measure
from .prefix import share_prefix
from .tasks import Example
from .tokenizer import Tokenizer


def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: list[Example],
    labels: tuple[str, ...],
    adapter: Adapter | None = None,
    theta: Tensor | None = None,
    demonstrations: tuple[Example, ...] = (),
) -> list[dict]:
    """How good R adapted models are on labelled rows: the metrics of `metrics.measure`, a dict a run.

    `theta` [R, M] are weights of `adapter`; without them the base model is scored, with `demonstrations` in its prompt
    if there are any. All prompts must end as the first one does. Raises UsageError for a label that merges with it,
    and for an adapter without its weights.

        score(model, tokenizer, examples, ("0", "1"), lora, trained.theta)[0]["acc"]
    """
    if (adapter is None) != (theta is None):
        raise UsageError("score: give an adapter with its weights theta [R, M], or neither")
    prompts = [example.prompt for example in examples]
    label_tokens = tokenizer.label_tokens(prompts[0], labels)
    scoring = Scoring(ends=tokenizer.eos_ids)
    if theta is None:
        with_prefix, ids = share_prefix(model, tokenizer, [list(demonstrations)], prompts)
        scores = label_scores(with_prefix, ids, label_tokens, scoring)
    else:
        ids = tokenizer.encode_all(prompts)
        scoring = replace(scoring, runs=len(theta))
        with adapted(model, adapter, theta) as student:
            scores = label_scores(student, ids, label_tokens, scoring)
    gold = torch.tensor([example.label for example in examples])
    metrics = []
    for r in range(scoring.runs):
        correct = scores.top[r] == gold
        metrics.append(measure(scores.confidence[r], correct, scores.log_probabilities[r], gold))
    return metrics
