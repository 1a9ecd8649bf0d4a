"""Cross-validation of one's own rows: every method at every rate on every fold, judged by the rows a fold never saw.

The three steps of a study, over folds instead of sets: teach every fold, train every method at every rate side by side,
score what was held out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import accumulate, product

import torch
from torch import Tensor
from tqdm import tqdm

from . import UsageError, parallel
from .adapters import adapted, make_adapter
from .batch import Row, truth_row
from .episode import Episode, balanced, draw_folds, seeded, with_demonstrations
from .evaluate import Scoring, answer_scores, answer_texts, label_scores, last_states, share_prefix
from .generate import STOP, Decoding
from .methods import BEGINS_WITH, METHODS, Grid
from .metrics import fit_temperature, row_losses
from .models.common import device_of
from .options import FitOptions, last_phase, phases
from .subject import Subject
from .tasks import Example, Task
from .teacher import Asked, label_tokens_at_most, observe, teach
from .train import Settings, Trained, warn_of_failed

SURE = 1.645  # standard errors by which another method must beat SFT: one chance in twenty
LEAST, ALONE = 4, 10  # rows that cross-validation needs; up to this many are left out one at a time
SOFT_K = 1024  # likeliest tokens of a distribution that is matched
UNSEEN = -87.0  # log-probability that the probe gives a label of which it has seen no row


@dataclass
class Candidate:
    """One way to answer, on rows that it has not seen: chosen among rates by the other folds' rows."""

    name: str
    scores: Tensor  # [n, C] log-probability of every label, or [n, 1] of the true answer, a token's mean
    losses: Tensor  # [n] negative log-likelihood of the true answer, at `temperature`
    temperature: float = 1.0
    rate: int | None = None  # index of the rate with the lowest loss over all folds
    picks: tuple[int, ...] = ()  # index of the rate taken for each fold
    right: Tensor | None = None  # [n] whether the likeliest label is the true one; None of texts


@dataclass
class CrossValidation:
    """Every method at every rate on every fold of one's rows, and what each says of the rows that the fold held out."""

    subject: Subject
    task: Task
    rows: list[Example]
    options: FitOptions
    more: list[Example] = field(default_factory=list)  # without answers: the teacher's are what IA2 learns from
    once: Callable = lambda name, make: make()  # keeps tensors, so that an interrupted fit goes on
    bar: Callable = lambda label, total: tqdm(disable=True)  # bar(label, total) -> context manager yielding a tqdm

    def __post_init__(self):
        subject, task, rows, options = self.subject, self.task, self.rows, self.options
        prompts = len({row.prompt for row in rows})
        if unknown := [name for name in options.methods if name not in METHODS]:
            raise UsageError(f"--methods {unknown[0]}: unknown; beside base and ICL can be tried {', '.join(METHODS)}")
        if not options.methods:
            raise UsageError("--methods: give at least one")
        if prompts < LEAST:
            needed = f"cross-validation needs at least {LEAST}; add rows"
            raise UsageError(f"{prompts} rows with different prompts: {needed}")
        self.labels = subject.tokenizer.label_tokens(rows[0].prompt, task.labels) if task.labels else []
        self.max_tokens = label_tokens_at_most(self.labels) if task.labels else task.max_tokens
        self.stop = None if options.chat else STOP
        self.gold = torch.tensor([row.label or 0 for row in rows])
        self.adapter = make_adapter(subject.model, options)
        self.layers = options.layer_numbers(subject.model.config.num_hidden_layers)
        self.rates = options.rates_for(subject.name, options.adapter)
        self.tokens = cache(lambda text: len(subject.tokenizer.encode(text)))  # each is asked for in every fold
        self.longest = max(rows, key=lambda row: self.tokens(row.prompt))
        self.fits: dict[str, Trained] = {}
        self.troubles: list[str] = []  # sentences about runs of which a loss was not finite
        self.answers: dict[int, list[Row]] = {}
        parts = prompts if prompts <= ALONE else min(options.folds, prompts)
        self.folds = draw_folds(rows, parts, self.shown, options.seed)
        self.folds = [replace(fold, **self.unlabelled(number, fold.train)) for number, fold in enumerate(self.folds)]
        self.places = torch.tensor(sum((f.test for f in self.folds), [])).argsort().tolist()  # of rows, fold after fold

    def unlabelled(self, number: int, train: list[Example]) -> dict:
        """The rows without answers and, after those of all others, their demonstrations, as fields of an episode."""
        rng = seeded(self.options.seed, number, "unlabelled")
        return {"unlabelled": self.more, "more_demonstrations": [self.shown(train, rng, row) for row in self.more]}

    def shown(self, rows: list[Example], rng, row: Example | None = None) -> list[Example]:
        """What the teacher sees before `row` (None: before every held-out row): others of `rows`, or the context."""
        longest = row or self.longest
        if self.options.context:
            if shown := self.cut([Example(self.options.context, "")], longest):
                return shown
            raise UsageError(f"the context leaves no room for {longest.prompt[:60]!r} in what the model reads; cut it")
        return self.cut(balanced(rows, self.options.demonstrations, rng, row.prompt if row else None), longest)

    def cut(self, shown: list[Example], row: Example) -> list[Example]:
        """The first of the demonstrations that fit into the model's context before `row` and its answer."""
        needed = self.tokens(row.prompt) + self.max_tokens - 1
        self.subject.check_room(row.prompt, needed)
        taken = accumulate(self.tokens(f"{e.prompt}{e.answer}\n\n") for e in shown)
        return [example for example, tokens in zip(shown, taken) if needed + tokens <= self.subject.reads]

    @contextmanager
    def training(self, about: tuple[str, int, int]) -> Iterator[Callable]:
        phase, runs, steps = about
        with self.bar(f"training {phase}", steps) as bar:
            yield lambda step, losses: bar.update(step - bar.n)

    def grid(self, episodes: list[Episode], rates) -> Grid:
        """Every episode with every rate, after the teacher's pass over them."""
        o, subject = self.options, self.subject
        needed, settings = phases(o.methods), Settings(o.batch_size, o.epochs, o.patience, self.layers)
        soft_k = SOFT_K if "soft" in needed else None
        asked = Asked(self.max_tokens, soft_k, self.layers, self.stop, residual="hidden" in needed)
        with self.bar("collecting", sum(len(e.demonstrations) for e in episodes)) as bar:
            told = partial(teach, subject.model, subject.tokenizer, asked=asked, watch=bar.update)
            sets = parallel.spread(told, episodes)
        return Grid(subject.model, self.adapter, sets, rates, seed=o.seed, settings=settings, progress=self.training)

    @cached_property
    def fold_grid(self) -> Grid:
        return replace(self.grid(self.folds, self.rates), first=self.trained)

    def trained(self, method: str) -> Trained:
        """All folds × rates of a method."""
        if method not in self.fits:
            kept = self.once(f"fit-{method}", lambda: vars(METHODS[method](self.fold_grid)))
            self.fits[method] = Trained(**kept | {"theta": kept["theta"].to(device_of(self.subject.model))})
            names = [f"fold {fold} at rate {rate:g}" for fold, rate in product(range(len(self.folds)), self.rates)]
            self.troubles += warn_of_failed(method, self.fits[method], names, len(self.folds))
        return self.fits[method]

    def score(self, student: Callable, prompts: list[list[int]], number: int, runs: int = 1) -> Tensor:
        """Log-probabilities [runs, n, C] of the labels of held-out rows, or of their true answers [runs, n, 1].

        With a context minus the KL from the teacher, who sees it, [runs, n, 1].
        """
        if self.labels:
            how = Scoring(runs, ends=self.subject.tokenizer.eos_ids)
            return label_scores(student, prompts, self.labels, how).log_probabilities
        rows = [replace(row, prompt=prompt) for row, prompt in zip(self.targets(number), prompts)]
        return answer_scores(student, rows, runs)[..., None]

    def targets(self, number: int) -> list[Row]:
        """A fold's held-out rows with their answers, with a context the teacher's distributions there."""
        if number not in self.answers:
            fold, tokenizer = self.folds[number], self.subject.tokenizer
            end = bool(self.options.context)  # of a person's own answers, how one ends is form
            rows = [truth_row(self.rows[i], tokenizer, end) for i in fold.test]
            if self.options.context:
                full = [tokenizer.encode(with_demonstrations(fold.icl[0], self.rows[i].prompt)) for i in fold.test]
                observe(self.subject.model, rows, full, Asked(self.max_tokens + 1, SOFT_K))
            self.answers[number] = rows
        return self.answers[number]

    @contextmanager
    def student(self, name: str, number: int, rates: slice) -> Iterator[tuple[Callable, list[list[int]]]]:
        """The model as `name` (base, icl or a method, at these rates) on fold `number`, and its held-out prompts."""
        model, tokenizer, fold = self.subject.model, self.subject.tokenizer, self.folds[number]
        texts = [self.rows[i].prompt for i in fold.test]
        if name in METHODS:
            theta = self.trained(name).theta.view(len(self.folds), len(self.rates), -1)[number, rates]
            with adapted(model, self.adapter, theta) as student:
                yield student, tokenizer.encode_all(texts)
            return
        yield share_prefix(model, tokenizer, fold.icl if name == "icl" else [[]], texts)

    def held_out(self, name: str) -> Tensor:
        """What `name` says of every row that its fold held out, [rates, n, C]; of base and icl [1, n, C]."""
        runs, rows = len(self.rates) if name in METHODS else 1, [fold.test for fold in self.folds]
        if name in METHODS:
            self.trained(name)  # before the bar of scoring begins
        with self.bar(f"scoring {name}", len(self.rows)) as bar:

            def scored(test: list[int]) -> Tensor:
                with self.student(name, number := rows.index(test), slice(None)) as (student, prompts):
                    return self.score(student, prompts, number, runs)

            return torch.cat(parallel.spread(scored, rows, bar.update), 1)[:, self.places]

    def texts(self, candidate: Candidate) -> tuple[list[str], list[float]]:
        """What a candidate answers to every held-out row, greedily, and how sure it is."""
        with self.bar(f"answers of {candidate.name}", len(self.rows)) as bar:

            def answers(number: int) -> tuple:
                pick, how = candidate.picks[number], Decoding(self.max_tokens, self.stop)
                with self.student(candidate.name, number, slice(pick, pick + 1)) as (student, prompts):
                    return answer_texts(student, self.subject.tokenizer, prompts, how, bar.update)

            parts = parallel.spread(answers, range(len(self.folds)))
        said, sure = (sum(part, []) for part in zip(*parts))
        return [said[i] for i in self.places], [sure[i] for i in self.places]

    def candidate(self, name: str) -> Candidate:
        """`name` with, for each fold, the rate that is best on all other folds: no row chooses for itself."""
        every = self.once(f"held-out-{name}", lambda: {"scores": self.held_out(name)})["scores"]
        losses = row_losses(every, self.gold)  # [rates, n]
        losses[losses.isnan().any(1)] = torch.inf  # a rate that failed in some fold
        nested, picks = torch.empty_like(every[0]), []
        for fold in self.folds:
            others = torch.ones(len(self.rows), dtype=torch.bool)
            others[fold.test] = False
            picks.append(int(losses[:, others].mean(1).argmin()))
            nested[fold.test] = every[picks[-1], fold.test]
        temperature = fit_temperature(nested, self.gold) if self.options.temperature else 1.0
        rate = int(losses.mean(1).argmin())
        losses, right = row_losses(nested, self.gold, temperature), nested.argmax(-1) == self.gold
        return Candidate(name, nested, losses, temperature, rate, tuple(picks), right if self.task.labels else None)

    def probe(self) -> Candidate | None:
        """L2-regularised logistic regression on the base's last hidden state; None without scikit-learn."""
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            return None
        states = last_states(self.subject.model, self.subject.tokenizer.encode_all([row.prompt for row in self.rows]))
        scores = torch.full((len(self.rows), len(self.task.labels)), UNSEEN)
        for fold in self.folds:
            others = sorted(set(range(len(self.rows))) - set(fold.test))
            scaled = StandardScaler().fit(states[others]).transform(states)
            if len(seen := sorted({int(self.gold[i]) for i in others})) > 1:
                fitted = LogisticRegression(C=0.1, max_iter=1000).fit(scaled[others], self.gold[others])
                found = torch.tensor(fitted.predict_log_proba(scaled[fold.test])).float()
                scores[torch.tensor(fold.test)[:, None], torch.tensor(seen)] = found
        return Candidate("probe", scores, row_losses(scores, self.gold))

    def final(self, winner: Candidate) -> Tensor:
        """Weights [1, M] of the winner trained on every row, each phase for the epochs that were best in the folds."""
        rows, o, rate = self.rows, self.options, winner.rate
        rng = seeded(o.seed, len(self.folds), "final")
        shown = [self.shown(rows, rng, row) for row in rows]
        everything = Episode(rows, [], shown, [], **self.unlabelled(len(self.folds), rows))
        grid, first = self.grid([everything], [self.rates[rate]]), {}
        for method in filter(None, (BEGINS_WITH.get(winner.name), winner.name)):
            best = self.trained(method).best.view(len(self.folds), -1)[:, rate].float().mean().item()
            more = 0 if last_phase(method) == "sft" else len(self.more)  # only the teacher answers these
            # steps an epoch, with every row and in a fold
            now, then = (-(-(len(e.train) + more) // o.batch_size) for e in (everything, self.folds[0]))
            settings = replace(grid.settings, steps=max(1, round(best * now / then)))
            first[method] = METHODS[method](replace(grid, settings=settings, first=first.get))
        if not (theta := first[winner.name].theta).isfinite().all():
            mend = "use lower --rates or --dtype float32"
            raise UsageError(f"{winner.name} at rate {self.rates[rate]:g} diverged when trained on every row; {mend}")
        return theta


def choose(candidates: dict[str, Candidate]) -> str:
    """What to ship: the lowest held-out loss; SFT, though, unless another (the base too) is surely better than SFT.

    "base" is no adapter: nothing was better. Surely: by `SURE` standard errors of the rows' paired differences. Where
    the teacher, ICL, is no better than SFT, it has little to pass on, and what learned from it is shipped only if it is
    also surely right on more rows than SFT (sign test). `python -m bench fit` measures how often this harms.
    """
    losses = {name: c.losses for name, c in candidates.items() if name in METHODS or name == "base"}
    best = min(losses, key=lambda name: losses[name].mean().item())
    if best == "base" or "sft" not in losses:
        return best
    ahead = {name: losses["sft"] - loss for name, loss in losses.items()}
    surely = [name for name, a in ahead.items() if a.mean() > SURE * a.std() / len(a) ** 0.5]
    if not surely:
        return "sft"
    alone = not phases((best,)) - {"sft"}  # it has learned nothing from the teacher
    if alone or candidates["icl"].losses.mean() < losses["sft"].mean():
        return best
    if right_more_often(candidates[best], candidates["sft"]):
        return best
    return "base" if "base" in surely else "sft"


def right_more_often(one: Candidate, other: Candidate) -> bool:
    """Whether one is right on more of the rows on which only one of them is, by a sign test at one chance in twenty."""
    if one.right is None or other.right is None:
        return False
    gained, lost = int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum())
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n < 0.05
