"""`step`: one training step; `cell`: everything that one cell of the paper's grid costs."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ia2mini.adapters import adapted
from ia2mini.episode import Row, collate, draw_episode, truth_row, with_demonstrations
from ia2mini.evaluate import label_scores
from ia2mini.graphs import Replayed
from ia2mini.teacher import teach
from ia2mini.train import METHODS, Adam, Fit, Job, SetRows, Settings, losses

from .peers import PEERS, Peer
from .report import Line, Result, agree
from .shapes import LABELS, SST2_LENGTHS, Stand
from .timing import Timing, clock, flops, gemm_ceiling, race

PHASES = {"ia2": ("mse", True), "sft": ("ce", False)}  # method -> (loss, on the teacher's rows)
NEVER = 10**9  # patience: every stack takes the same number of steps


def set_rows(stand: Stand, n: int, number: int, lengths=SST2_LENGTHS, tokens: int = 1) -> SetRows:
    """Set `number` of random rows, after the teacher's pass."""
    pool = stand.examples(n + min(max(1, n // 2), 48), lengths, tokens, seed=number)
    episode = draw_episode(pool, n, number)
    truth = [truth_row(example, stand.tokenizer, tokens == 1) for example in episode.train + episode.dev]
    taught = teach(stand.model, stand.tokenizer, episode, tokens)
    return SetRows(truth[:n], truth[n:], taught[:n], taught[n:])


def part(rows: SetRows, method: str) -> tuple[list[Row], list[Row]]:
    return (rows.icl_train, rows.icl_dev) if PHASES[method][1] else (rows.train, rows.dev)


class OurStep:
    """The body of `train.fit`'s loop for R runs whose rows stay the same."""

    def __init__(self, stand: Stand, runs: list[list[Row]], phase: str, theta: Tensor, rate: float = 1e-3):
        self.stand, self.batch = stand, collate(runs, stand.device, pack=True)
        self.mix = {phase: torch.ones(len(runs), device=stand.device)}
        self.optimizer = Adam(theta, torch.full((len(runs),), rate, device=stand.device))
        self.update = Replayed(lambda: self.optimizer.step(self.gradient()[1]), torch.device(stand.device))

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Losses [R] and the gradient [R, M]."""
        with adapted(self.stand.model, self.stand.adapter, self.optimizer.theta) as student:
            found = losses(student, self.batch, self.mix)
            return found.detach(), *torch.autograd.grad(found.sum(), self.optimizer.theta)

    def __call__(self) -> None:
        self.update()


def check_step(stand: Stand, rows: list[Row], method: str) -> str:
    """Loss and gradient of one run are the same in all stacks."""
    phase = PHASES[method][0]
    theta = stand.theta(1, trained=True)
    ours = OurStep(stand, [rows], phase, theta)
    loss, gradient = (found[0] for found in ours.gradient())
    remark = ""
    for kind in PEERS.values():
        peer = kind(stand)
        peer.begin(theta[0], 0.0)  # a rate of zero: the step leaves the weights, but not the gradient
        peer.optimizer.zero_grad = lambda: None
        remark = agree(f"{method} loss", loss, peer.step(rows, phase))
        agree(f"{method} gradient", gradient, torch.cat([p.grad.flatten() for p in peer.weights]))
    return remark


def step(stand: Stand, runs: int = 15, n: int = 4, tokens: int = 26, seconds: float = 8.0) -> Result:
    """One step of `runs` runs on `n` rows of `tokens` tokens each, single-token answers; a run's share of it against a peer's step."""
    rows = [set_rows(stand, n, number, (tokens,)) for number in range(5)]
    ceiling = gemm_ceiling(stand.config, runs * n * tokens, stand.device, stand.model.lm_head.weight.dtype)
    result = Result(
        "step", f"{stand.about}; {runs} runs × {n} rows × {tokens} tokens; GEMM {ceiling / 1e9:.0f} GFLOP/s", []
    )
    for method, (phase, _) in PHASES.items():
        mine = [part(rows[r % 5], method)[0] for r in range(runs)]
        result.remarks.append(check_step(stand, mine[0], method))
        ours = OurStep(stand, mine, phase, stand.theta(runs))
        stacks = {"us": ours}
        for name, kind in PEERS.items():
            peer = kind(stand)
            peer.begin(stand.theta()[0], 1e-3)
            stacks[name] = lambda peer=peer, mine=mine, phase=phase: peer.step(mine[0], phase)
        work = flops(stand.config, n, tokens, n, phase == "ce", backward=True, rank=8)
        times = race(stacks, 7, seconds, stand.device)
        times["us"] = times["us"].scaled(1 / runs)
        for name, timing in times.items():
            rate = work / timing.seconds
            rates = {"tokens/s": n * tokens / timing.seconds, "FLOP/s": rate, "GEMM": rate / ceiling}
            result.lines.append(Line(method, name, timing, "run and step", rates))
        for name in PEERS:
            result.ratio(f"{method}: {name} / us", times[name], times["us"])
    return result


@dataclass(frozen=True)
class Size:
    """How much of a cell: `sets` × `rates` runs of each method, `steps` steps each, `rows` evaluation rows."""

    sets: int = 5
    rates: int = 3
    steps: int = 50
    rows: int = 500
    n: int = 4

    @property
    def runs(self) -> int:
        return self.sets * self.rates

    def times(self, seconds: dict[str, float], whole: "Size", share: float) -> dict[str, float]:
        """Seconds a stage of this size, scaled to the `whole`: every stage is linear in its own counts. `share`: of evaluation tokens."""
        train = whole.runs * whole.steps / (self.runs * self.steps)
        factors = {"collect": whole.sets / self.sets, "train": train, "evaluate": whole.runs / (self.runs * share)}
        return {stage: seconds[stage] * factor for stage, factor in factors.items()}

    def said(self, whole: "Size") -> str:
        if self == whole:
            return "whole"
        counts = (
            (3 * self.runs, 3 * whole.runs, "runs"),
            (self.steps, whole.steps, "steps"),
            (self.rows, whole.rows, "rows"),
        )
        return "extrapolated from " + ", ".join(
            f"{here} of {there} {what}" for here, there, what in counts if here != there
        )


RATES = (1e-4, 3e-4, 1e-3)


def sample(prompts: list[list[int]], rows: int, name: str) -> list[list[int]]:
    """`rows` of the prompts. Batches sorted by length are padded as little as with all prompts: two blocks of neighbours in length."""
    if name == "(a)" or rows == len(prompts):  # (a) takes them as they come
        return prompts[:rows]
    ordered = sorted(prompts, key=len)
    return [p for quarter in (1, 3) for p in ordered[quarter * len(ordered) // 4 - rows // 4 :][: rows // 2]]


def our_cell(stand: Stand, size: Size, prompts: list[list[int]], tokens: int = 1) -> tuple[dict[str, float], Tensor]:
    """Seconds a stage, and top-1 probabilities [methods, R, Q] (none when answers have many `tokens`: only trained then)."""
    sets: list[SetRows] = []
    settings = Settings(epochs=-(-size.steps // max(1, size.n // 4)), patience=NEVER)
    seconds = {
        "collect": clock(
            lambda: sets.extend(set_rows(stand, size.n, i, tokens=tokens) for i in range(size.sets)), stand.device
        )
    }
    fits: dict[str, Fit] = {}
    job = Job(stand.model, stand.adapter, sets, RATES[: size.rates], settings=settings, first=fits.__getitem__)

    def train():
        for method in ("sft", "ia2", "ia2-sft"):
            fits[method] = METHODS[method](job)

    seconds["train"] = clock(train, stand.device)
    tops: list[Tensor] = []
    labels = stand.tokenizer.label_ids("w20", LABELS)

    def evaluate():
        for method_fit in fits.values():
            with adapted(stand.model, stand.adapter, method_fit.theta) as student:
                tops.append(label_scores(student, prompts, labels, runs=size.runs, device=stand.device).confidence)

    if tokens == 1:
        seconds["evaluate"] = clock(evaluate, stand.device)
    return seconds, torch.stack(tops) if tops else torch.empty(0)


def peer_cell(peer: Peer, size: Size, prompts: list[list[int]]) -> tuple[dict[str, float], Tensor]:
    """The same, one run after another."""
    stand = peer.stand
    sets: list[SetRows] = []

    def collect():
        for i in range(size.sets):
            pool = stand.examples(size.n + max(1, size.n // 2), SST2_LENGTHS, 1, seed=i)
            episode = draw_episode(pool, size.n, i)
            truth = [truth_row(example, stand.tokenizer, True) for example in episode.train + episode.dev]
            shown = zip(episode.demonstrations, episode.train + episode.dev)
            full = [
                stand.tokenizer.encode(with_demonstrations(demonstrations, e.prompt)) for demonstrations, e in shown
            ]
            taught = peer.collect([r.prompt for r in truth], full, 1)
            sets.append(SetRows(truth[: size.n], truth[size.n :], taught[: size.n], taught[size.n :]))

    seconds = {"collect": clock(collect, stand.device), "train": 0.0, "evaluate": 0.0}
    job = Job(stand.model, stand.adapter, sets, RATES[: size.rates])
    thetas, tops = job.start(job.grid()), {}
    labels = stand.tokenizer.label_ids("w20", LABELS)
    for run, (number, rate, _) in enumerate(job.grid()):
        kept: dict[str, list[Tensor]] = {}
        for method in ("sft", "ia2", "ia2-sft"):
            rows, dev = part(sets[number], method[-3:])

            def train(method=method, rows=rows, dev=dev, run=run, rate=rate, kept=kept):
                if method == "ia2-sft":
                    peer.load(kept["ia2"], rate)
                else:
                    peer.begin(thetas[run], rate)
                kept[method] = peer.train(rows, dev, PHASES[method[-3:]][0], size.steps)
                peer.load(kept[method], rate)

            seconds["train"] += clock(train, stand.device)
            with peer.merged():
                score = partial(peer.score, prompts, labels)
                seconds["evaluate"] += clock(
                    lambda at=(method, run), score=score: tops.update({at: score()[0]}), stand.device
                )
    return seconds, torch.stack(
        [torch.stack([tops[m, r] for r in range(size.runs)]) for m in ("sft", "ia2", "ia2-sft")]
    )


def check_cell(stand: Stand) -> str:
    """A short cell gives the same top-1 probabilities in all stacks."""
    small, remark = Size(2, 1, 2, 8), ""
    prompts = stand.prompts(small.rows, SST2_LENGTHS, seed=99)
    ours = our_cell(stand, small, prompts)[1]
    for kind in PEERS.values():
        remark = agree("top-1 probabilities after training", ours, peer_cell(kind(stand), small, prompts)[1], 2e-2)
    return remark


def cell(stand: Stand, whole: Size = Size(), parts: dict[str, Size] | None = None, repeats: int = 2) -> Result:
    """A cell under every stack; `parts`: how much of it each one does, the rest is extrapolated."""
    parts = parts or {}
    parts = {name: parts.get(name, whole) for name in ("us", *PEERS)}
    about = f"{stand.about}; {whole.sets} sets × {whole.rates} rates × (sft, ia2, ia2-sft), N = {whole.n}, prompt lengths of SST2, "
    about += f"{whole.steps} steps a run with a look after each, {whole.rows} evaluation rows"
    result = Result("cell", about, [], remarks=[check_cell(stand)])
    peers, prompts = (
        {name: kind(stand) for name, kind in PEERS.items()},
        stand.prompts(whole.rows, SST2_LENGTHS, seed=99),
    )
    some = {name: sample(prompts, size.rows, name) for name, size in parts.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, size in parts.items():
            spent = (our_cell(stand, size, some[name]) if name == "us" else peer_cell(peers[name], size, some[name]))[0]
            found[name].append(size.times(spent, whole, sum(map(len, some[name])) / sum(map(len, prompts))))
    totals = {}
    for name, stages in found.items():
        totals[name] = Timing.of([sum(spent.values()) for spent in stages])
        rates = {"runs/hour": 3 * whole.runs * 3600 / totals[name].seconds}
        result.lines.append(Line("whole cell", name, totals[name], "cell", rates, parts[name].said(whole)))
        for stage in stages[0]:
            result.lines.append(Line(f"  {stage}", name, Timing.of([spent[stage] for spent in stages])))
    for name in PEERS:
        result.ratio(f"{name} / us", totals[name], totals["us"])
        for stage in ("collect", "train", "evaluate"):
            times = [min(spent[stage] for spent in found[who]) for who in (name, "us")]
            result.ratios[f"  {stage}: {name} / us"] = times[0] / times[1]
    return result


def portions(shape: str, device: str) -> tuple[Size, dict[str, Size], int]:
    """What of a cell is measured so that a CPU is done in minutes: everything where it is small."""
    whole = Size()
    if device != "cpu":
        return whole, {"(b)": replace(whole, sets=2, rates=1), "(a)": replace(whole, sets=1, rates=1)}, 2
    if shape == "tiny":
        return whole, {"(b)": replace(whole, sets=2, rates=1), "(a)": replace(whole, sets=1, rates=1)}, 2
    short = replace(whole, steps=2, rows=40)
    return (
        whole,
        {
            "us": short,
            "(b)": replace(short, sets=1, rates=1, steps=3, rows=128),
            "(a)": replace(short, sets=1, rates=1),
        },
        2,
    )
