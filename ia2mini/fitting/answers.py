"""The likelihood of answers, and generated answers with their confidence.

R runs, Q prompts, P answer tokens of the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import Batch, TokenRow, Watch, by_length, collate, join_groups, send
from ..generate import Decoding, responses
from ..losses import cross_entropy, kl_divergence
from ..models.taps import device_of, network_of
from ..tokenizer import Tokenizer


@torch.no_grad()
def answer_scores(
    model: Callable,
    rows: list[TokenRow],
    runs: int = 1,
    budget: int = 4096,
    ends: tuple[int, ...] = (),
) -> Tensor:
    """Mean log-probability per answer token of each row, or minus its mean KL with `soft`: [R, Q] float32 on the CPU.

    Every token of `ends` ends a text; an answer token among them counts with the sum of their probabilities.
    """
    device = device_of(model)
    end_tokens = torch.tensor(ends, dtype=torch.int64)
    groups = by_length(list(map(len, rows)), max(1, budget // runs))
    parts = []
    for group in groups:
        group_rows = [rows[i] for i in group]
        batch = collate([group_rows] * runs)
        closing = torch.isin(batch.targets, end_tokens).nonzero()[:, 0]
        batch = batch.to(device)
        states = model(batch.ids, logits=batch.at, head=False)
        head = network_of(model).lm_head.weight
        loss = answer_loss(batch, send(closing, device), ends, states, head)
        loss = loss.view(runs, -1)  # [R, P / R]
        sizes = [len(row.answer) for row in group_rows]
        means = [part.mean(1) for part in loss.split(sizes, 1)]
        parts.append(-torch.stack(means, 1))
    return join_groups(parts, groups, dim=1).cpu()


def answer_loss(
    batch: Batch, closing: Tensor, ends: tuple[int, ...], states: Tensor, head: Tensor
) -> Tensor:
    """KL from the teacher's distributions where the batch has them, else cross-entropy on the answers, [P].

    At the places `closing` the answer ends: any of the tokens `ends` is right there.
    """
    if batch.soft is not None:
        return kl_divergence(states, head, batch.soft, batch.soft_ids)
    loss = cross_entropy(states, head, batch.targets)
    if len(ends) > 1 and len(closing):
        log_probabilities = []
        for end in ends:
            this_end = torch.full_like(closing, end)
            log_probabilities.append(-cross_entropy(states[closing], head, this_end))
        loss[closing] = -torch.stack(log_probabilities).logsumexp(0)
    return loss


def answer_texts(
    model: Callable,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    decoding: Decoding,
    watch: Watch = None,
) -> list[tuple[str, float]]:
    """What a model answers to each prompt, greedily, and the geometric mean of its tokens' probabilities.

    Every token that was generated counts: an EOS with the probability of all EOS tokens, or those of the stop text.
    """
    answers = responses(model, tokenizer, prompts, decoding, watch)
    rows = []
    texts = []
    for prompt, response in zip(prompts, answers):
        rows.append(TokenRow(prompt, response.generated))
        texts.append(tokenizer.decode(response.ids))
    confidences = answer_scores(model, rows, ends=tokenizer.eos_ids)[0].exp()
    return list(zip(texts, confidences.tolist()))
