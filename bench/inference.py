"""`collect`: the teacher's pass over long answers; `icl`: queries after demonstrations; `generate`: decoding."""

from itertools import accumulate

import torch
from ia2mini.models.taps import Taps

from ia2mini.batch import TokenRow, collate
from ia2mini.episode import Episode, with_demonstrations
from ia2mini.generate import Decoding
from ia2mini.generate import generate as decode
from ia2mini.labels import label_scores
from ia2mini.prefix import share_prefix
from ia2mini.scale.decode import fast_decoding
from ia2mini.teacher import Taught, TeacherSettings, teach

from .cost import Pass, flops
from .peers import AsReleased, UsedWell
from .report import Line, Result, agree
from .shapes import LABELS, SST2_LENGTHS, Stand
from .timing import Timing, clock, gemm_ceiling, race

QUESTION = 60  # tokens of a GSM8K row, roughly, under Qwen3's tokenizer
ANSWER = 120


def spread(tokens: int, count: int) -> list[int]:
    """`count` of `tokens` tokens, evenly: a forward's cost grows nearly linearly, so their mean stands for all."""
    return [int((i + 0.5) * tokens / count) for i in range(count)]


@torch.no_grad()
def same_tokens(
    stand: Stand, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> str:
    """Both stacks generate the same tokens.

    In bfloat16 rounding may decide between two likely tokens, and what follows differs. There ours need only be the
    likeliest for transformers, to rounding, after the same text.
    """
    if stand.dtype == torch.float32:
        return agree("tokens", ours, theirs, 0)
    chosen = []
    best = []
    for prompt, response in zip(prompts, ours):
        ids = torch.tensor([prompt + response], device=stand.device)
        logits = stand.net(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()  # [P, V]
        chosen.append(logits.gather(1, ids[0, len(prompt) :, None])[:, 0])
        best.append(logits.amax(-1))
    return agree(
        "logits of the generated tokens", torch.cat(chosen), torch.cat(best), stand.tolerance
    )


def comparable(ours: list[TokenRow], theirs: list[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention outputs of two stacks [L, P, D] at the positions that both have reached by the same tokens."""
    pairs = [], []
    for mine, other in zip(ours, theirs):
        equal = [a == b for a, b in zip(mine.answer, other.answer)]
        # what predicts the first token is the same for both
        shared = 1 + sum(accumulate(equal[:-1], min))
        for found, row in zip(pairs, (mine, other)):
            found.append(row.activations[:, :shared].cpu())
    return torch.cat(pairs[0], 1), torch.cat(pairs[1], 1)


def our_collect(stand: Stand, episode: Episode, tokens: int) -> Taught:
    settings = TeacherSettings(tokens, hooks=fast_decoding(stand.device, tokens))
    return teach(stand.model, stand.tokenizer, episode, settings)


def our_generate(stand: Stand, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    decoding = Decoding(tokens, hooks=fast_decoding(stand.device, tokens))
    return decode(stand.model, stand.tokenizer, prompts, decoding)


def add_timings(
    result: Result,
    what: tuple[str, str],
    times: dict[str, Timing],
    counts: dict[str, int],
    notes: dict[str, str],
) -> None:
    """A line for every stack, and how much faster than each peer we are.

    `what` was timed, and its unit; `counts`: how many of something were done, to be told a second.
    """
    name, unit = what
    for stack, timing in times.items():
        rates = {said: count / timing.seconds for said, count in counts.items()}
        result.add(Line(name, stack, timing, unit, rates, notes.get(stack, "")))
    for stack, timing in times.items():
        if stack != "us":
            result.ratio(f"{stack} / us", timing, times["us"])


def collect(
    stand: Stand,
    rows: int = 8,
    tokens: int = 200,
    demonstrations: int = 3,
    sample: int = 4,
    seconds: float = 25.0,
) -> Result:
    """Responses of `tokens` tokens and their attention outputs for `rows` rows; peer (a) does `sample` passes."""
    pool = stand.examples(rows * (demonstrations + 1), (QUESTION,), ANSWER)
    shown = [pool[rows + i * demonstrations :][:demonstrations] for i in range(rows)]
    episode = Episode(pool[:rows], [], shown, [])
    queries = [stand.tokenizer.encode(e.prompt) for e in pool[:rows]]
    prompts = [
        stand.tokenizer.encode(with_demonstrations(d, e.prompt)) for d, e in zip(shown, pool)
    ]
    length = len(prompts[0])
    about = f"{stand.about}; {rows} rows of {length} tokens with {demonstrations} demonstrations, "
    about += f"{tokens} tokens generated"
    result = Result("collect", about, [])
    a = AsReleased(stand)
    b = UsedWell(stand)
    two = Episode(pool[:2], [], shown[:2], [])
    result.remark(same_outputs(stand, a, b, two, queries[:2], prompts[:2]))

    times = race(
        {
            "us": lambda: our_collect(stand, episode, tokens),
            "(b)": lambda: b.collect(queries, prompts, tokens),
        },
        3,
        seconds,
        stand.device,
    )
    passes = spread(tokens, sample)
    some = race(
        {"(a)": lambda: a.collect(queries[:1], prompts[:1], tokens, passes)},
        2,
        seconds / 2,
        stand.device,
    )
    times["(a)"] = some["(a)"].scaled(rows * tokens / sample)
    notes = {"(a)": f"extrapolated from {sample} of {rows * tokens} passes"}
    add_timings(result, ("collect", "set"), times, {"answer tokens/s": rows * tokens}, notes)
    overhead(stand, result, prompts, tokens, seconds / 4)
    return result


def same_outputs(
    stand: Stand,
    a: AsReleased,
    b: UsedWell,
    episode: Episode,
    queries: list[list[int]],
    prompts: list[list[int]],
) -> str:
    """That both peers see the attention outputs that we see, after the same eight tokens of each response."""
    ours = our_collect(stand, episode, 8).icl_train
    theirs = b.collect(queries, prompts, 8)
    same_tokens(stand, prompts, [row.answer for row in ours], [row.answer for row in theirs])
    for others in (a.collect(queries[:1], prompts[:1], 8), theirs):
        remark = agree("attention outputs", *comparable(ours, others), stand.tolerance)
    return remark


@torch.no_grad()
def overhead(
    stand: Stand, result: Result, prompts: list[list[int]], tokens: int, seconds: float
) -> None:
    """What taps at the answer positions add to a plain forward."""
    batch = collate([[TokenRow(p, p[:tokens]) for p in prompts]]).to(stand.device)
    last = (batch.at[0][tokens - 1 :: tokens], batch.at[1][tokens - 1 :: tokens])
    stacks = {
        "plain": lambda: stand.model(batch.ids, logits=last),
        "tapped": lambda: stand.model(batch.ids, taps=Taps(batch.at), logits=last),
    }
    times = race(stacks, 5, seconds, stand.device)
    work = flops(stand.config, Pass(*batch.ids.shape, len(last[0])))
    ceiling = gemm_ceiling(
        stand.config, batch.ids.numel(), stand.device, stand.model.lm_head.weight.dtype
    )
    for name, timing in times.items():
        rates = {"FLOP/s": work / timing.seconds, "GEMM": work / timing.seconds / ceiling}
        result.add(Line("forward pass", name, timing, "pass", rates))
    result.ratio("tapped / plain", times["tapped"], times["plain"])


def icl(
    stand: Stand,
    queries: int = 500,
    shown: int = 30,
    size: int = 33,
    sample: int = 16,
    seconds: float = 20.0,
) -> Result:
    """`queries` single-token queries after the same ~1k tokens of demonstrations; the peers take some of them."""
    pool = stand.examples(shown, (size,))
    texts = [e.prompt for e in stand.examples(queries, SST2_LENGTHS, seed=1)]
    prefix = [t for e in pool for t in stand.tokenizer.encode(e.prompt + e.answer)]
    ids = stand.tokenizer.encode_all(texts)
    labels = stand.tokenizer.label_tokens("w20", LABELS)
    first = [label for (label,) in labels]
    a = AsReleased(stand)
    b = UsedWell(stand)

    def ours(count: int = queries):
        model, rest = share_prefix(stand.model, stand.tokenizer, [pool], texts[:count])
        return label_scores(model, rest, labels)

    about = f"{stand.about}; {queries} queries with SST2's lengths, {len(prefix)} tokens of demonstrations"
    result = Result("icl", about, [])
    whole = [prefix + query for query in ids]
    with a.net.disable_adapter(), b.net.disable_adapter():
        mine = ours(4)
        for found in (
            a.score(whole[:4], first),
            b.score(whole[:4], first),
            b.score(ids[:4], first, prefix=prefix),
        ):
            remark = agree("top-1 probabilities", mine.confidence[0], found[0], stand.tolerance)
            agree("label probabilities", mine.log_probabilities.exp()[0], found[1], stand.tolerance)
        result.remark(remark)
        cached = min(128, queries)
        stacks = {
            "us": ours,
            "(b)": lambda: b.score(whole[:sample], first, sample),
            "(b) with a copied cache": lambda: b.score(ids[:cached], first, prefix=prefix),
        }
        times = race(stacks, 3, seconds, stand.device)
        times["(a)"] = Timing.of([clock(lambda: a.score(whole[:4], first), stand.device)])
    notes = {}
    for name, count in {"(b)": sample, "(b) with a copied cache": cached, "(a)": 4}.items():
        times[name] = times[name].scaled(queries / count)
        if count < queries:
            notes[name] = f"extrapolated from {count} queries"
    what = ("ICL evaluation", f"{queries} queries")
    add_timings(result, what, times, {"queries/s": queries}, notes)
    return result


def generate(
    stand: Stand,
    rows: int = 16,
    length: int = 64,
    tokens: int = 64,
    sample: int = 4,
    seconds: float = 15.0,
) -> Result:
    """`tokens` greedy tokens after `rows` prompts of `length`, nothing ending early; peer (a) does `sample` passes."""
    prompts = stand.prompts(rows, (length,))
    a = AsReleased(stand)
    b = UsedWell(stand)
    result = Result(
        "generate",
        f"{stand.about}; {rows} prompts of {length} tokens, {tokens} new tokens each",
        [],
    )
    mine = our_generate(stand, prompts[:4], 16)
    result.remark(same_tokens(stand, prompts[:4], mine, b.generate(prompts[:4], 16)))
    same_tokens(stand, prompts[:1], mine[:1], a.generate(prompts[:1], 16))
    stacks = {
        "us": lambda: our_generate(stand, prompts, tokens),
        "(b)": lambda: b.generate(prompts, tokens),
    }
    times = race(stacks, 5, seconds, stand.device)
    some = race(
        {"(a)": lambda: a.generate(prompts[:1], tokens, spread(tokens, sample))},
        3,
        seconds / 2,
        stand.device,
    )
    times["(a)"] = some["(a)"].scaled(rows * tokens / sample)
    notes = {"(a)": f"extrapolated from {sample} of {rows * tokens} passes"}
    add_timings(result, ("generate", "batch"), times, {"new tokens/s": rows * tokens}, notes)
    return result
