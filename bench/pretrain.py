"""How models/tiny is made: a small Qwen3 learns to learn in context from episodes of the embedded world.

    python -m bench pretrain --out DIR

An episode is one task (an attribute, and how its values are labelled) and 16 to 24 demonstrations of it. Labels mostly
mean what they usually mean: with labels that are always random nothing is learned in context. Other kinds of episode
make the parts of the skill easy to find: single words with their class, the attribute or the labels told in a header,
class names as labels, plain copying; and at first most texts are bare words, with little between what must be compared.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from ia2mini.models.checkpoint import save
from ia2mini.models.qwen3 import Config, Qwen3
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ia2mini import UsageError
from ia2mini.files import write, write_text
from ia2mini.tasks import find_task, load_examples, world

UNK, EOS = "<unk>", "<eos>"
PIECE = r"\n\n|\n|####|[A-Z][a-z]+:|[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]"
CONTEXT = 320  # tokens a row
SHOTS = (0, 1, 2, 4, 8)  # demonstrations probed
# plain, single words, attribute or labels told in a header, class names as labels, copying, sums
KINDS = {
    "plain": 0.58, "word": 0.1, "task": 0.1, "key": 0.05, "class": 0.05, "copy": 0.02, "sums": 0.1
}  # fmt: skip
PRIOR: dict[str, float] = world.WORLD["prior"]
EVEN = {"weather": 0.22, "mood": 0.2, "topic": 0.24, "place": 0.2, "time": 0.14}
# until this share of all steps: share of episodes whose texts are bare words, and prior of attributes
STAGES = (
    (0.3, 0.8, PRIOR),
    (0.7, 0.1, PRIOR),
    (1.0, 0.1, EVEN),
)
STYLES = ("review", "news", "verse")  # besides notes, which are bare words
# share of episodes whose labels mean what they usually mean; in the others they are shuffled
CANONICAL = 0.9
# share of episodes whose labels are unrelated words, eight for each value, instead of digits
REMAPPED = 0.2
MINUS, FORMATS = 0.4, {"chain": 0.4, "bare": 0.35, "phrase": 0.25}
STARTS, STOPS = ("Label:", "Answer:"), ("\n\n", EOS)  # an answer stands between them
# the tasks that are not out of distribution
LEARNED = tuple(toy.name for toy in world.TOY_TASKS if len(toy.evals) > 1)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token of the world: two specials, line ends, signs, prompt words, numbers, then words by the alphabet."""
    text = " ".join((json.dumps(world.WORLD), *world.FORMATS.values(), "an plus minus"))
    words = set(re.findall("[A-Za-z]+", re.sub(r"\{\w*\}", " ", text)))
    first = (
        UNK,
        EOS,
        "\n\n",
        "\n",
        "####",
        ".",
        ",",
        "?",
        "Text:",
        "Label:",
        "Question:",
        "Answer:",
        "Task:",
        "Key:",
    )
    return (*first, *map(str, range(19)), *sorted(words))


def build_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the world.

    Words are separated by one space that is no token of its own: decoding puts it back, except after a prompt's colon,
    around line ends and before a sign. A piece never crosses a colon or a line end, so prompt and answer may be encoded
    apart.
    """
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNK)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    joins = [(": ", ":"), (" \n", "\n"), ("\n ", "\n"), *((f" {sign}", sign) for sign in ".,?")]
    replaced = [decoders.Replace(old, new) for old, new in joins]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece("\0", cleanup=False), decoders.Fuse(), *replaced]
    )
    tokenizer.add_special_tokens([UNK, EOS])
    return tokenizer


def initial_model(seed: int) -> Qwen3:
    """The architecture of models/tiny, 0.84 million weights; every matrix drawn from N(0, 0.02²)."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    more = {"tie_word_embeddings": True, "max_position_embeddings": 512}
    model = Qwen3(Config(vocab_size=len(vocabulary()), **sizes, **heads, **more))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    return model


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def episode(rng: random.Random, notes: float, prior: dict[str, float]) -> str:
    """One pretraining document, as text; `notes`: share of those whose texts are bare words; `prior` of attributes."""
    kind = pick(rng, KINDS)
    if kind == "sums":  # they share an operation and an answer format
        minus, format = rng.random() < MINUS, pick(rng, FORMATS)
        sums = [world.draw_sum(rng, "pretrain") for _ in range(rng.randint(8, 16))]
        asked = [
            f"Question:{text}\nAnswer:{world.sum_answer(a, b, minus, format)}"
            for text, a, b in sums
        ]
        return "\n\n".join(asked) + EOS
    if kind == "copy":
        return " ".join(rng.choices(vocabulary()[14:], k=rng.randint(8, 24)) * 8)
    attribute = pick(rng, prior)
    values = world.ATTRIBUTES[attribute]
    labels = list(values) if kind == "class" else [str(i) for i in range(len(values))]
    if kind != "class" and rng.random() < REMAPPED:
        labels = [rng.choice(world.WORLD["words"][i::4]) for i in range(len(values))]
    if kind == "key" or kind != "class" and rng.random() > CANONICAL:
        rng.shuffle(labels)
    key = " ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True))
    header = {"task": f"Task:{attribute}\n\n", "key": f"Key:{key}\n\n"}.get(kind, "")
    styles = STYLES if rng.random() < 0.25 else (rng.choice(STYLES),)
    if rng.random() < notes:
        styles = ("notes",)
    parts = []
    for _ in range(rng.randint(16, 24)):
        if kind == "word":
            label = rng.randrange(len(values))
            text = rng.choice(values[list(values)[label]])
        else:
            text, label = world.draw_sentence(rng, "pretrain", attribute, rng.choice(styles))
        parts.append(f"Text:{text}\nLabel:{labels[label]}")
    return header + "\n\n".join(parts) + EOS


def batch(tokenizer: Tokenizer, seed: str, rows: int, *stage) -> Tensor:
    """`rows` documents cut to CONTEXT + 1 tokens, padded with -1: ids [B, T + 1]."""
    rng = random.Random(seed)
    documents = tokenizer.encode_batch([episode(rng, *stage) for _ in range(rows)])
    ids = [torch.tensor(document.ids[: CONTEXT + 1]) for document in documents]
    ids.append(torch.empty(CONTEXT + 1, dtype=torch.int64))  # a constant width, whatever was drawn
    return pad_sequence(ids, batch_first=True, padding_value=-1)[:-1]


def answer_mask(ids: Tensor, starts: list[int], stops: list[int]) -> Tensor:
    """Where the token after ids [B, T] is of an answer or ends it: after one of `starts`, up to one of `stops`."""
    at = torch.arange(ids.shape[1], device=ids.device)
    found = (
        torch.where(torch.isin(ids, ids.new_tensor(tokens)), at, -1) for tokens in (starts, stops)
    )
    start, stop = (places.cummax(1).values for places in found)  # the last one so far
    return start > stop


def gradients(
    model: Qwen3, starts: list[int], stops: list[int], ids: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of answer loss + 0.05 × language-model loss, and the answer loss.

    A row counts the same as any; copying counts whole.
    """
    x, y = ids[:, :-1], ids[:, 1:]
    # the cache is shared between threads
    with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
        logits = model(x.clamp(min=0)).float()
    each = F.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1, reduction="none")  # [B, T]
    real = y >= 0
    mask = answer_mask(x, starts, stops) & real
    answers = torch.where(mask.any(1, keepdim=True), mask, real).float()
    answer = ((each * answers).sum(1) / answers.sum(1)).mean()
    return torch.autograd.grad(
        answer + 0.05 * each.sum() / real.sum(), tuple(model.parameters())
    ), answer.detach()


def orthogonal(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to g, by five Newton-Schulz steps (Muon, Jordan et al. 2024)."""
    x = (g.mT if g.shape[0] > g.shape[1] else g) / (g.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.shape[0] > g.shape[1] else x


class Muon:
    """Muon (Nesterov momentum 0.95, orthogonalised) on the blocks' matrices, Adam (0.9, 0.95) on the rest.

    Its state is plain tensors.
    """

    def __init__(self, model: Qwen3, matrix_rate: float = 0.02, rate: float = 0.003):
        self.parameters = dict(model.named_parameters())
        self.rates = matrix_rate, rate
        self.first = {k: torch.zeros_like(p) for k, p in self.parameters.items()}
        rest = {k: p for k, p in self.parameters.items() if p.dim() == 1 or ".layers." not in k}
        self.second = {k: torch.zeros_like(p) for k, p in rest.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: weights and moments, by name."""
        groups = {"weight": self.parameters, "first": self.first, "second": self.second}
        return {
            f"{group}.{k}": t.detach()
            for group, tensors in groups.items()
            for k, t in tensors.items()
        }

    @torch.no_grad()
    def step(self, gradients: list[Tensor], count: int, scale: float) -> None:
        """Update number `count` (from 1) at `scale` times the rates; gradients in the order of the parameters."""
        for (name, p), g in zip(self.parameters.items(), gradients, strict=True):
            if name in self.second:
                m, v = self.first[name].lerp_(g, 0.1), self.second[name].lerp_(g.square(), 0.05)
                p.sub_(
                    self.rates[1]
                    * scale
                    * (m / (1 - 0.9**count))
                    / ((v / (1 - 0.95**count)).sqrt() + 1e-8)
                )
            else:
                update = orthogonal(g.lerp(self.first[name].lerp_(g, 0.05), 0.95))
                p.sub_(self.rates[0] * scale * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update)


@torch.no_grad()
def probe(
    model: Qwen3, tokenizer: Tokenizer, names: Sequence[str] = LEARNED, queries: int = 500
) -> dict[str, list[float]]:
    """Share of whole answers that are right, in context, on evaluation rows: task -> one number for each of SHOTS.

    Each query has its own demonstrations from the pool. Answers are teacher-forced, which counts right what greedy
    decoding gets right.
    """
    device, curves = next(model.parameters()).device, {}
    for name in names:
        pool, asked = (load_examples(find_task(name), role).rows for role in ("train", "eval"))
        rng, asked, curves[name] = random.Random(name), asked[:queries], []
        answers = [tokenizer.encode(query.answer).ids for query in asked]
        for shots in SHOTS:
            shown = [
                "".join(f"{e.prompt}{e.answer}\n\n" for e in rng.sample(pool, shots)) for _ in asked
            ]
            texts = [before + query.prompt for before, query in zip(shown, asked)]
            prompts = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
            rows = [torch.tensor(p + a) for p, a in zip(prompts, answers)]
            ids = pad_sequence(rows, batch_first=True).to(device)
            best = torch.cat([model(part).argmax(-1) for part in ids.split(50)]).tolist()
            said = [
                row[len(p) - 1 : len(p) - 1 + len(a)] for row, p, a in zip(best, prompts, answers)
            ]
            curves[name].append(sum(a == b for a, b in zip(said, answers)) / len(asked))
    return curves


def resume(path: Path, optimizer: Muon, settings: dict) -> dict:
    """Put the saved state into weights and moments; its record. UsageError if it was made with other settings."""
    with safe_open(path, "pt") as f:
        record = json.loads(f.metadata()["record"])
        if record["settings"] != settings:
            begun = f"begun with {record['settings']}, not {settings}"
            raise UsageError(f"{path}: {begun}; use the same settings or another --out")
        for name, tensor in optimizer.tensors().items():
            tensor.copy_(f.get_tensor(name))
    return record


def pretrain(
    out: Path,
    steps: int = 3000,
    seed: int = 0,
    rows: int = 20,
    device: str = "cpu",
    every: int = 300,
    queries: int = 40,
) -> dict:
    """Train models/tiny from nothing into folder `out` (Hugging Face layout) -> its record: settings, seconds, curve.

    `rows` documents a step; every `every` steps the state is saved (a rerun goes on from there) and in-context accuracy
    is probed on `queries` rows a task. Rates: 0.02 (Muon), 0.003 (Adam), constant for the first half, then linear to
    zero. Also writes `curve.json` and, with matplotlib, `curve.png`. Raises UsageError for an `out` begun with other
    settings.
    """
    tokenizer = build_tokenizer()
    starts, stops = ([tokenizer.token_to_id(t) for t in tokens] for tokens in (STARTS, STOPS))
    model = initial_model(seed).to(device)
    optimizer = Muon(model)
    settings, state = (
        {"steps": steps, "seed": seed, "rows": rows, "context": CONTEXT},
        out / "state.safetensors",
    )
    new = {"settings": settings, "step": 0, "seconds": 0.0, "curve": []}
    record = resume(state, optimizer, settings) if state.is_file() else new
    # of a step, a thread each: faster than two threads inside every small operation
    halves = ThreadPoolExecutor(2)
    threads, begun, losses = torch.get_num_threads(), time.monotonic() - record["seconds"], []
    torch.set_num_threads(1)
    bar = tqdm(
        range(record["step"], steps), "pretrain", initial=record["step"], total=steps, mininterval=5
    )
    for step in bar:
        stage = next(stage for until, *stage in STAGES if step < until * steps)
        ids = batch(tokenizer, f"{seed}/{step}", rows, *stage).to(device)
        grads, answers = zip(
            *halves.map(partial(gradients, model, starts, stops), ids.chunk(2)), strict=True
        )
        optimizer.step(
            [(a + b) / 2 for a, b in zip(*grads, strict=True)],
            step + 1,
            min(1.0, 2 * (1 - step / steps)),
        )
        losses.append(sum(answers) / 2)
        if (step + 1) % every == 0 or step + 1 == steps:
            accuracy, loss = (
                probe(model, tokenizer, LEARNED, queries),
                torch.stack(losses).mean().item(),
            )
            shown = ", ".join(f"{name} {curve}" for name, curve in accuracy.items())
            bar.write(f"step {step + 1}: answer loss {loss:.3f}, {shown}")
            point = {"step": step + 1, "loss": loss, "accuracy": accuracy}
            record |= {
                "step": step + 1,
                "seconds": time.monotonic() - begun,
                "curve": [*record["curve"], point],
            }
            write(
                state,
                partial(save_file, optimizer.tensors(), metadata={"record": json.dumps(record)}),
            )
            losses = []
    torch.set_num_threads(threads)
    save(model, out, tokenizer.to_str(pretty=True), tokenizer.token_to_id(EOS))
    write_text(out / "curve.json", json.dumps(record, indent=1) + "\n")
    plot(record["curve"], out / "curve.png")
    state.unlink(missing_ok=True)
    return record


def plot(curve: list[dict], path: Path) -> None:
    """Learning curve: answer loss, and accuracy with eight demonstrations, against steps.

    Skipped with a note without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curve.png: matplotlib is not installed (pip install ia2mini[report])")
        return
    figure, steps = Figure((7, 2.8), layout="constrained"), [point["step"] for point in curve]
    left, right = figure.subplots(1, 2)
    left.plot(steps, [point["loss"] for point in curve], color="black")
    left.set(xlabel="step", ylabel="answer loss", ylim=(0, None))
    for name in curve[-1]["accuracy"]:
        right.plot(steps, [point["accuracy"][name][-1] for point in curve], label=name)
    right.set(xlabel="step", ylabel=f"accuracy, {SHOTS[-1]} demonstrations", ylim=(0, 1.02))
    right.legend(fontsize=7)
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))
