"""The same work done with transformers and peft, in two ways.

(a) `AsReleased`, as the paper's scripts go about it: training and collecting one row at a time, a full forward without
cache for every generated token, hooks that clone the whole attention output of every layer, logits at every position,
`.item()` on every row; evaluation in batches of eight. (Not counted against it: those scripts also read the model from
disk again for every adapter.)

(b) `UsedWell`, as someone would who knows both libraries: batches, a cache, rows sorted by length, left padding so that
`logits_to_keep` reaches the answers, no head where no loss needs it, hooks that keep answer positions only, fused Adam,
merged adapters in evaluation, one model in memory for all runs.

Both train one run after another: neither library trains several LoRAs over one forward pass.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ia2mini.batch import TokenRow

from .shapes import Stand, set_peft


@contextmanager
def hooks(attentions: list[nn.Module], catch: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `catch(layer, output)` with every attention module's output [B, T, D]."""

    def hook(layer):
        return lambda module, inputs, output: catch(layer, output[0])

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(attentions)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Peer:
    """What both ways share: peft's model, its optimizer, and the order of training, looks and scoring."""

    adam: dict = {}

    def __init__(self, stand: Stand):
        self.stand, self.device = stand, stand.device
        self.net = stand.peft()
        self.attentions = [
            module for name, module in self.net.named_modules() if name.endswith("self_attn")
        ]
        self.weights = [p for p in self.net.parameters() if p.requires_grad]

    def begin(self, theta: Tensor, rate: float) -> None:
        """A new run: LoRA weights [M] and a fresh optimizer."""
        set_peft(self.net, theta, self.stand.adapter)
        self.optimizer = torch.optim.Adam(self.weights, lr=rate, **self.adam)

    def state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.weights]

    def train(
        self, rows: list[TokenRow], dev: list[TokenRow], phase: str, steps: int
    ) -> tuple[list[Tensor], float]:
        """`steps` steps on all rows, an evaluation of the dev loss after each; the best weights and their dev loss."""
        best = float("inf")
        kept = self.state()
        for _ in range(steps):
            self.step(rows, phase)
            loss = self.look(dev, phase)
            if loss < best:
                best, kept = loss, self.state()
        return kept, best

    def load(self, state: list[Tensor], rate: float) -> None:
        """Begin again from the weights of `state`."""
        with torch.no_grad():
            for p, kept in zip(self.weights, state):
                p.copy_(kept)
        self.optimizer = torch.optim.Adam(self.weights, lr=rate, **self.adam)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The adapter added into the weights, which our model shares: it must not run meanwhile."""
        kept = {m: m.base_layer.weight.data for m in self.net.modules() if hasattr(m, "base_layer")}
        for module, weight in kept.items():
            module.base_layer.weight.data = weight.clone()
        self.net.merge_adapter()
        try:
            yield
        finally:
            self.net.unmerge_adapter()
            for module, weight in kept.items():
                module.base_layer.weight.data = weight


def left_padded(prompts: list[list[int]], device) -> dict[str, Tensor]:
    """ids, mask and positions of prompts that end together."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


class AsReleased(Peer):
    """Peer (a)."""

    @torch.no_grad()
    def collect(
        self,
        queries: list[list[int]],
        prompts: list[list[int]],
        tokens: int,
        at: list[int] | None = None,
    ) -> list[TokenRow]:
        """Responses and attention outputs under full prompts. `at`: only these of the `tokens` passes."""
        rows = []
        found: dict[int, Tensor] = {}
        with (
            self.net.disable_adapter(),
            hooks(self.attentions, lambda layer, output: found.update({layer: output.clone()})),
        ):
            for query, prompt in zip(queries, prompts):
                ids = list(prompt)
                answer: list[int] = []
                activations = []
                for token in range(tokens):
                    if at is not None and token not in at:
                        ids.append(ids[-1])
                        continue
                    batch = torch.tensor([ids], device=self.device)
                    logits = self.net(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
                    activations.append(
                        torch.stack([found[layer][0, -1].cpu().clone() for layer in sorted(found)])
                    )
                    answer.append(logits[:, -1].argmax(-1)[0].item())
                    ids.append(answer[-1])
                rows.append(TokenRow(query, answer, torch.stack(activations, 1)))
        return rows

    def loss(self, row: TokenRow, phase: str) -> Tensor:
        ids = torch.tensor([row.prompt + row.answer], device=self.device)
        mask = torch.ones_like(ids)
        if phase == "ce":
            labels = torch.full_like(ids, -100)
            labels[0, len(row.prompt) :] = ids[0, len(row.prompt) :]
            return self.net(input_ids=ids, attention_mask=mask, labels=labels).loss
        found: dict[int, Tensor] = {}
        with hooks(self.attentions, lambda layer, output: found.update({layer: output.clone()})):
            self.net(input_ids=ids, attention_mask=mask)
        start = len(row.prompt) - 1
        mine = torch.stack(
            [found[layer][0, start : start + len(row.answer)] for layer in sorted(found)]
        )
        return F.mse_loss(mine, row.activations.to(self.device)) * len(found)

    def step(self, rows: list[TokenRow], phase: str) -> float:
        """One optimizer step on all rows; their mean loss before it."""
        total = 0.0
        for row in rows:
            loss = self.loss(row, phase)
            (loss / len(rows)).backward()
            total += loss.item() / len(rows)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def look(self, rows: list[TokenRow], phase: str) -> float:
        return sum(self.loss(row, phase).item() for row in rows) / len(rows)

    @torch.no_grad()
    def score(self, prompts: list[list[int]], labels: list[int]) -> tuple[Tensor, Tensor]:
        """Top-1 probability [Q] and label probabilities [Q, C]."""
        top = []
        shares = []
        for start in range(0, len(prompts), 8):
            probabilities = (
                self.net(**left_padded(prompts[start : start + 8], self.device))
                .logits[:, -1]
                .softmax(-1)
            )
            best = torch.topk(probabilities, 10)
            top.append(best.values[:, 0].cpu())
            shares.append(probabilities[:, labels].cpu())
        return torch.cat(top), torch.cat(shares)

    def generate(
        self, prompts: list[list[int]], tokens: int, at: list[int] | None = None
    ) -> list[list[int]]:
        return [row.answer for row in self.collect(prompts, prompts, tokens, at)]


class UsedWell(Peer):
    """Peer (b)."""

    adam = {"fused": True}

    @torch.no_grad()
    def collect(
        self, queries: list[list[int]], prompts: list[list[int]], tokens: int
    ) -> list[TokenRow]:
        """Responses and attention outputs under full prompts: caught while a cached batch generates."""
        found: dict[int, list[Tensor]] = {}
        batch = left_padded(prompts, self.device)

        def catch(layer, output):
            found.setdefault(layer, []).append(output[:, -1].clone())

        with self.net.disable_adapter(), hooks(self.attentions, catch):
            if tokens == 1:
                answers = self.net(**batch, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            else:
                answers = self.generated(batch, tokens)
        # [B, L, P, D]
        activations = torch.stack([torch.stack(found[layer], 1) for layer in sorted(found)], 1)
        return [TokenRow(q, a, x) for q, a, x in zip(queries, answers.tolist(), activations)]

    def generated(self, batch: dict[str, Tensor], tokens: int) -> Tensor:
        # generate makes its own
        batch = {key: value for key, value in batch.items() if key != "position_ids"}
        return self.net.generate(**batch, max_new_tokens=tokens, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        with self.net.disable_adapter():
            return self.generated(left_padded(prompts, self.device), tokens).tolist()

    def loss(self, rows: list[TokenRow], phase: str) -> Tensor:
        """Mean loss of rows that end together, so that the answers stand in the last columns."""
        batch = left_padded([row.prompt + row.answer[:-1] for row in rows], self.device)
        most = max(len(row.answer) for row in rows)
        weights = torch.tensor(
            [
                [0.0] * (most - len(r.answer)) + [1 / (len(rows) * len(r.answer))] * len(r.answer)
                for r in rows
            ]
        )
        weights = weights.to(self.device)
        if phase == "ce":
            targets = torch.tensor(
                [[0] * (most - len(row.answer)) + row.answer for row in rows], device=self.device
            )
            logits = self.net(**batch, logits_to_keep=most, use_cache=False).logits.float()
            return (
                F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weights
            ).sum()
        found: dict[int, Tensor] = {}
        with hooks(self.attentions, lambda layer, output: found.update({layer: output[:, -most:]})):
            self.net.base_model.model.model(**batch, use_cache=False)  # no head
        mine = torch.stack([found[layer] for layer in sorted(found)])  # [L, B, P, D]
        padded = [F.pad(row.activations, (0, 0, most - len(row.answer), 0)) for row in rows]
        return (
            (mine.float() - torch.stack(padded, 1).float()).square().mean(-1).sum(0) * weights
        ).sum()

    def step(self, rows: list[TokenRow], phase: str) -> float:
        loss = self.loss(rows, phase)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def look(self, rows: list[TokenRow], phase: str) -> float:
        return self.loss(rows, phase).item()

    @torch.no_grad()
    def score(
        self,
        prompts: list[list[int]],
        labels: list[int],
        size: int = 64,
        prefix: list[int] | None = None,
    ):
        """Top-1 probability [Q] and label probabilities [Q, C]; `prefix`: keys and values, copied for every batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        top = torch.zeros(len(prompts))
        shares = torch.zeros(len(prompts), len(labels))
        if prefix:
            shown = torch.tensor([prefix], device=self.device)
            said = self.net(input_ids=shown, use_cache=True)
            # its name from transformers 5.24 on, and before
            name = "cache" if hasattr(said, "cache") else "past_key_values"
            cache = said[name]
        for start in range(0, len(order), size):
            group = order[start : start + size]
            batch = left_padded([prompts[i] for i in group], self.device)
            if prefix:
                batch[name] = copy.deepcopy(cache)
                batch[name].batch_repeat_interleave(len(group))
                batch["position_ids"] = batch["position_ids"] + len(prefix)
                batch["attention_mask"] = F.pad(batch["attention_mask"], (len(prefix), 0), value=1)
            logits = self.net(**batch, logits_to_keep=1, use_cache=bool(prefix)).logits
            probabilities = logits[:, -1].float().softmax(-1)
            top[group] = probabilities.amax(-1).cpu()
            shares[group] = probabilities[:, labels].cpu()
        return top, shares


PEERS = {"(a)": AsReleased, "(b)": UsedWell}
