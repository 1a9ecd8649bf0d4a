"""`step`: one training step; `cell`: everything that one cell of the paper's grid costs."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ia2mini.adapters import adapted
from ia2mini.batch import TokenRow, collate, truth_row
from ia2mini.engine.experiment import make_trainer
from ia2mini.engine.options import last_phase
from ia2mini.episode import draw_episode, with_demonstrations
from ia2mini.labels import Scoring, label_scores
from ia2mini.methods import METHODS, STARTS_FROM, Grid
from ia2mini.scale.decode import fast_decoding
from ia2mini.scale.graphs import CapturedStep, recorded
from ia2mini.scale.pack import in_batches, pack
from ia2mini.teacher import Taught, TeacherSettings, teach
from ia2mini.train import Hooks, Settings, State, Trained, adam, run_losses

from .cost import Pass, flops
from .peers import PEERS, Peer
from .report import Line, Result, agree, tell
from .shapes import LABELS, SST2_LENGTHS, Stand
from .timing import Timing, clock, gemm_ceiling, race

PHASES = {"ia2": ("mse", True), "sft": ("ce", False)}  # method -> (loss, on the teacher's rows)
NEVER = 10**9  # patience: every stack takes the same number of steps


def taught_set(stand: Stand, n: int, number: int, lengths=SST2_LENGTHS, tokens: int = 1) -> Taught:
    """Set `number` of random rows, after the teacher's pass."""
    pool = stand.examples(n + min(max(1, n // 2), 48), lengths, tokens, seed=number)
    settings = TeacherSettings(tokens, hooks=fast_decoding(stand.device, tokens))
    return teach(stand.model, stand.tokenizer, draw_episode(pool, n, number), settings)


def part(rows: Taught, method: str) -> tuple[list[TokenRow], list[TokenRow]]:
    return (rows.icl_train, rows.icl_dev) if PHASES[method][1] else (rows.train, rows.dev)


class OurStep:
    """A step of the training loop for R runs whose rows stay the same."""

    def __init__(
        self,
        stand: Stand,
        runs: list[list[TokenRow]],
        phase: str,
        theta: Tensor,
        rate: float = 1e-3,
    ):
        self.stand = stand
        self.batch = pack(collate(runs)).to(stand.device)
        self.mix = {phase: torch.ones(len(runs), device=stand.device)}
        self.state = State.begin(theta)
        self.rates = torch.full((len(runs), 1), rate, device=stand.device)
        self.update = CapturedStep(self.step, stand.device)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Losses [R] and the gradient [R, M]."""
        theta = self.state.theta
        with adapted(self.stand.model, self.stand.adapter, theta) as student:
            found = run_losses(student, self.batch, self.mix)
            return found.detach(), *torch.autograd.grad(found.sum(), theta)

    def step(self) -> None:
        _, gradient = self.gradient()
        state = self.state
        adam(state.theta.detach(), gradient, state.m, state.v, state.t, self.rates)

    def __call__(self) -> None:
        self.update()


def check_step(stand: Stand, rows: list[TokenRow], method: str) -> str:
    """Loss and gradient of one run are the same in all stacks."""
    phase = PHASES[method][0]
    theta = stand.theta(1, trained=True)
    ours = OurStep(stand, [rows], phase, theta)
    loss, gradient = (found[0] for found in ours.gradient())
    remark = ""
    for kind in PEERS.values():
        peer = kind(stand)
        # a rate of zero: the step leaves the weights, but not the gradient
        peer.begin(theta[0], 0.0)
        peer.optimizer.zero_grad = lambda: None
        remark = agree(f"{method} loss", loss, peer.step(rows, phase), stand.tolerance)
        theirs = torch.cat([p.grad.flatten() for p in peer.weights])
        agree(f"{method} gradient", gradient, theirs, stand.tolerance)
    return remark


def step(
    stand: Stand, runs: int = 15, n: int = 4, tokens: int = 26, seconds: float = 8.0
) -> Result:
    """One step of `runs` runs on `n` rows of `tokens` tokens, one-token answers; a run's share, and a peer's step."""
    rows = [taught_set(stand, n, number, (tokens,)) for number in range(5)]
    ceiling = gemm_ceiling(
        stand.config, runs * n * tokens, stand.device, stand.model.lm_head.weight.dtype
    )
    result = Result(
        "step",
        f"{stand.about}; {runs} runs × {n} rows × {tokens} tokens; GEMM {ceiling / 1e9:.0f} GFLOP/s",
        [],
    )
    for method, (phase, _) in PHASES.items():
        mine = [part(rows[r % 5], method)[0] for r in range(runs)]
        result.remark(check_step(stand, mine[0], method))
        ours = OurStep(stand, mine, phase, stand.theta(runs))
        stacks = {"us": ours}
        for name, kind in PEERS.items():
            peer = kind(stand)
            peer.begin(stand.theta()[0], 1e-3)
            stacks[name] = lambda peer=peer, mine=mine, phase=phase: peer.step(mine[0], phase)
        work = flops(stand.config, Pass(n, tokens, n, phase == "ce", backward=True, rank=8))
        times = race(stacks, 7, seconds, stand.device)
        times["us"] = times["us"].scaled(1 / runs)
        for name, timing in times.items():
            rate = work / timing.seconds
            rates = {
                "tokens/s": n * tokens / timing.seconds,
                "FLOP/s": rate,
                "GEMM": rate / ceiling,
            }
            result.add(Line(method, name, timing, "run and step", rates))
        for name in PEERS:
            result.ratio(f"{method}: {name} / us", times[name], times["us"])
    return result


@dataclass(frozen=True)
class Size:
    """How much of a cell: `sets` × `rates` runs of each method, `steps` steps each, `rows` evaluation rows.

    `select`: "dev" scores the runs of the rate with the lowest dev loss, one a set; "eval" scores every run.
    """

    sets: int = 5
    rates: int = 3
    steps: int = 50
    rows: int = 500
    n: int = 4
    select: str = "dev"

    @property
    def runs(self) -> int:
        return self.sets * self.rates

    @property
    def scored(self) -> int:
        """Runs of each method that are scored."""
        return self.sets if self.select == "dev" else self.runs

    def times(self, seconds: dict[str, float], whole: "Size", share: float) -> dict[str, float]:
        """Seconds a stage of this size, scaled to the `whole`: every stage is linear in its own counts.

        `share`: of evaluation tokens.
        """
        train = whole.runs * whole.steps / (self.runs * self.steps)
        evaluate = whole.scored / (self.scored * share)
        factors = {"collect": whole.sets / self.sets, "train": train, "evaluate": evaluate}
        return {stage: seconds[stage] * factor for stage, factor in factors.items()}

    def said(self, whole: "Size") -> str:
        if self == whole:
            return "whole"
        counts = (
            (3 * self.runs, 3 * whole.runs, "runs"),
            (3 * self.scored, 3 * whole.scored, "scored runs"),
            (self.steps, whole.steps, "steps"),
            (self.rows, whole.rows, "rows"),
        )
        return "extrapolated from " + ", ".join(
            f"{here} of {there} {what}" for here, there, what in counts if here != there
        )

    def chosen(self, dev_loss: Tensor) -> list[int]:
        """Which runs are scored, by their dev losses [sets * rates]."""
        if self.select == "eval":
            return list(range(self.runs))
        rate = dev_loss.view(self.sets, self.rates).mean(0).argmin().item()
        return list(range(rate, self.runs, self.rates))


RATES = (1e-4, 3e-4, 1e-3)
CELL = ("sft", "ia2", "ia2-sft")  # methods of a cell, in order


def sample(prompts: list[list[int]], rows: int, name: str) -> list[list[int]]:
    """`rows` of the prompts.

    Batches sorted by length are padded as little as with all prompts: two blocks of neighbours in length.
    """
    if name == "(a)" or rows == len(prompts):  # (a) takes them as they come
        return prompts[:rows]
    ordered = sorted(prompts, key=len)
    return [
        p
        for quarter in (1, 3)
        for p in ordered[quarter * len(ordered) // 4 - rows // 4 :][: rows // 2]
    ]


def our_grid(stand: Stand, sets: list[Taught], size: Size) -> Grid:
    """The runs of a cell, trained as `ia2mini run` trains them, all to their last step."""
    settings = Settings(epochs=-(-size.steps // max(1, size.n // 4)), patience=NEVER)
    hooks = Hooks(in_batches, partial(recorded, device=stand.device))
    rates = RATES[: size.rates]
    return Grid(
        stand.model,
        stand.adapter,
        sets,
        rates,
        settings=settings,
        hooks=hooks,
        trainer=make_trainer(None),
    )


def our_cell(
    stand: Stand, size: Size, prompts: list[list[int]], tokens: int = 1
) -> tuple[dict[str, float], list[list[int]], Tensor]:
    """Seconds a stage, the scored runs of each method, and their top-1 probabilities [methods, runs, Q].

    Where answers have many `tokens` nothing is scored.
    """
    sets: list[Taught] = []
    fits: dict[str, Trained] = {}
    picked: list[list[int]] = []
    tops: list[Tensor] = []
    labels = stand.tokenizer.label_tokens("w20", LABELS)

    def collect():
        sets.extend(taught_set(stand, size.n, i, tokens=tokens) for i in range(size.sets))

    def train():
        grid = our_grid(stand, sets, size)
        for method in CELL:
            started = [fits[STARTS_FROM[method]]] if method in STARTS_FROM else []
            fits[method] = METHODS[method](grid, *started)

    def evaluate():
        for trained in fits.values():
            picked.append(size.chosen(trained.dev_loss))
            with adapted(stand.model, stand.adapter, trained.theta[picked[-1]]) as student:
                tops.append(label_scores(student, prompts, labels, Scoring(size.scored)).confidence)

    stages = (collect, train, evaluate) if tokens == 1 else (collect, train)
    seconds = {stage.__name__: clock(stage, stand.device) for stage in stages}
    return seconds, picked, torch.stack(tops) if tops else torch.empty(0)


def peer_sets(peer: Peer, size: Size) -> list[Taught]:
    """The same sets as ours, taught by the peer."""
    stand = peer.stand
    sets = []
    for i in range(size.sets):
        pool = stand.examples(size.n + max(1, size.n // 2), SST2_LENGTHS, 1, seed=i)
        episode = draw_episode(pool, size.n, i)
        examples = episode.train + episode.dev
        truth = [truth_row(example, stand.tokenizer, False) for example in examples]
        shown = [with_demonstrations(d, e.prompt) for d, e in zip(episode.demonstrations, examples)]
        taught = peer.collect([r.prompt for r in truth], stand.tokenizer.encode_all(shown), 1)
        sets.append(Taught(truth[: size.n], truth[size.n :], taught[: size.n], taught[size.n :]))
    return sets


def peer_cell(
    peer: Peer, size: Size, prompts: list[list[int]]
) -> tuple[dict[str, float], list[list[int]], Tensor]:
    """The same, one run after another."""
    sets: list[Taught] = []
    # the best weights of each run
    kept: dict[str, list[list[Tensor]]] = {method: [] for method in CELL}
    dev: dict[str, list[float]] = {method: [] for method in CELL}
    picked: list[list[int]] = []
    tops: list[Tensor] = []
    labels = [label for (label,) in peer.stand.tokenizer.label_tokens("w20", LABELS)]

    def train():
        grid = our_grid(peer.stand, sets, size)
        for run, (number, rate, _) in enumerate(grid.configs("sft")):
            for method in CELL:
                if method in STARTS_FROM:
                    peer.load(kept[STARTS_FROM[method]][run], rate)
                else:
                    peer.begin(grid.first_weights(number), rate)
                last = last_phase(method)
                best, loss = peer.train(*part(sets[number], last), PHASES[last][0], size.steps)
                kept[method].append(best)
                dev[method].append(loss)

    def evaluate():
        for method in CELL:
            picked.append(size.chosen(torch.tensor(dev[method])))
            for run in picked[-1]:
                peer.load(kept[method][run], 0.0)
                with peer.merged():
                    tops.append(peer.score(prompts, labels)[0])

    def collect():
        sets.extend(peer_sets(peer, size))

    seconds = {stage.__name__: clock(stage, peer.device) for stage in (collect, train, evaluate)}
    return seconds, picked, torch.stack(tops).unflatten(0, (len(CELL), -1))


def check_cell(stand: Stand, small: Size = Size(2, 1, 2, 8)) -> str:
    """A short cell gives the same top-1 probabilities of the same runs in all stacks."""
    remark = ""
    prompts = stand.prompts(small.rows, SST2_LENGTHS, seed=99)
    _, runs, ours = our_cell(stand, small, prompts)
    for kind in PEERS.values():
        _, same, theirs = peer_cell(kind(stand), small, prompts)
        assert runs == same, (
            f"the stacks score different runs: {runs} and {same}; nothing was timed"
        )
        allowed = max(2e-2, stand.tolerance)
        remark = agree("top-1 probabilities after training", ours, theirs, allowed)
    return remark


SCORES = {"dev": "scores the chosen rate's runs", "eval": "scores every run"}


def cell(
    stand: Stand, whole: Size = Size(), parts: dict[str, Size] | None = None, repeats: int = 2
) -> Result:
    """A cell under every stack; `parts`: how much of it each one does, the rest is extrapolated."""
    parts = parts or {}
    parts = {name: parts.get(name, whole) for name in ("us", *PEERS)}
    about = f"{stand.about}; {whole.sets} sets × {whole.rates} rates × (sft, ia2, ia2-sft), N = {whole.n}, "
    about += f"prompt lengths of SST2, {whole.steps} steps a run with a look after each, {whole.rows} evaluation rows"
    result = Result("cell", about, [])
    result.remark(check_cell(stand))
    peers = {name: kind(stand) for name, kind in PEERS.items()}
    prompts = stand.prompts(whole.rows, SST2_LENGTHS, seed=99)
    some = {name: sample(prompts, size.rows, name) for name, size in parts.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, size in parts.items():
            if name == "us":
                spent = our_cell(stand, size, some[name])[0]
            else:
                spent = peer_cell(peers[name], size, some[name])[0]
            stages = ", ".join(f"{stage} {seconds:.3g} s" for stage, seconds in spent.items())
            tell(f"{name}: {stages} ({size.said(whole)})")
            found[name].append(
                size.times(spent, whole, sum(map(len, some[name])) / sum(map(len, prompts)))
            )
    totals = {}
    for name, stages in found.items():
        totals[name] = Timing.of([sum(spent.values()) for spent in stages])
        rates = {"runs/hour": 3 * whole.runs * 3600 / totals[name].seconds}
        note = f"{SCORES[whole.select]}, {3 * whole.scored} of {3 * whole.runs}; {parts[name].said(whole)}"
        result.add(Line("whole cell", name, totals[name], "cell", rates, note))
        for stage in stages[0]:
            result.add(Line(f"  {stage}", name, Timing.of([spent[stage] for spent in stages])))
    for name in PEERS:
        result.ratio(f"{name} / us", totals[name], totals["us"])
        for stage in ("collect", "train", "evaluate"):
            times = [min(spent[stage] for spent in found[who]) for who in (name, "us")]
            result.ratios[f"  {stage}: {name} / us"] = times[0] / times[1]
    return result


def portions(shape: str, device: str, select: str = "dev") -> tuple[Size, dict[str, Size], int]:
    """What of a cell is measured so that a CPU is done in minutes: everything where it is small."""
    whole = Size(select=select)
    if device != "cpu" and shape != "tiny":
        (b, a) = (replace(whole, sets=sets, rates=1, steps=10, rows=128) for sets in (2, 1))
        return whole, {"(b)": b, "(a)": a}, 2
    if shape == "tiny":
        return (
            whole,
            {"(b)": replace(whole, sets=2, rates=1), "(a)": replace(whole, sets=1, rates=1)},
            2,
        )
    short = replace(whole, steps=2, rows=40)
    some = replace(short, sets=1, rates=1, steps=3, rows=128)
    return whole, {"us": short, "(b)": some, "(a)": replace(short, sets=1, rates=1)}, 2
