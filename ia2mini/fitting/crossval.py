"""Cross-validation of one's own rows: every method at every rate on every fold, judged by the rows a fold never saw.

Every phase trains for a fixed number of epochs, on all rows of a fold and later on all rows: no row decides when to
stop. n rows, F folds, S settings of a method (its learning rates), R = F * S runs, C labels.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import accumulate, product

import torch
from torch import Tensor
from tqdm import tqdm

from .. import UsageError
from ..adapters import adapted
from ..batch import Row, truth_row
from ..engine.adapter import make_adapter
from ..engine.experiment import in_order, make_trainer, warn_of_failed
from ..engine.options import FitOptions, last_phase, losses_of
from ..engine.subject import Subject
from ..episode import Episode, among_themselves, balanced, draw_folds, seeded
from ..generate import STOP, Decoding
from ..labels import Scoring, label_scores
from ..methods import BEHIND_DEMONSTRATIONS, METHODS, STARTS_FROM, Grid
from ..models.taps import device_of
from ..prefix import share_prefix
from ..scale import ranks
from ..scale.decode import fast_decoding
from ..scale.graphs import recorded
from ..scale.pack import in_batches
from ..scoring import answer_scores, answer_texts, last_states
from ..tasks import Example, Task, same_answer
from ..tasks.rows import spoken
from ..teacher import Asked, label_tokens_at_most, observe, teach, true_rows
from ..train import Hooks, Settings, State, Trained
from .probe import PENALTIES, Probe, fit_probe, held_out_scores
from .selection import Candidate, Selection, Tried

LEAST, ALONE = 4, 10  # rows that cross-validation needs; up to this many are left out one at a time
SOFT_K = 1024  # likeliest tokens of a distribution that is matched


@dataclass
class CrossValidation:
    """Every way to answer on every fold of one's rows, and what each says of the rows that the fold held out."""

    subject: Subject
    task: Task
    rows: list[Example]
    options: FitOptions
    # without answers: the teacher's are what IA2 learns from
    more: list[Example] = field(default_factory=list)
    once: Callable = lambda name, make: make()  # keeps tensors, so that an interrupted fit goes on
    # bar(label, total) -> context manager yielding a tqdm
    bar: Callable = lambda label, total: tqdm(disable=True)

    def __post_init__(self):
        subject, task, rows, options = self.subject, self.task, self.rows, self.options
        prompts = len({row.prompt for row in rows})
        check_methods(options.methods)
        if options.ship and options.ship not in self.names[1:]:
            tried = ", ".join(self.names[1:])
            raise UsageError(f"--ship {options.ship}: is not tried; what is tried here is {tried}")
        if prompts < LEAST:
            needed = f"cross-validation needs at least {LEAST}; add rows"
            raise UsageError(f"{prompts} rows with different prompts: {needed}")
        self.labels = []
        self.max_tokens = task.max_tokens
        if task.labels:
            said = spoken(task.prompt, task.labels)
            self.labels = subject.tokenizer.label_tokens(rows[0].prompt, said)
            self.max_tokens = label_tokens_at_most(self.labels)
        self.stop = None if options.chat else STOP
        self.gold = torch.tensor([row.label or 0 for row in rows])
        self.adapter = make_adapter(subject.model, options)
        self.layers = options.layer_numbers(subject.model.config.num_hidden_layers)
        self.rates = options.rates_for(subject.name, options.adapter)
        # each is asked for in every fold
        self.tokens = cache(lambda text: len(subject.tokenizer.encode(text)))
        self.longest = max([*rows, *self.more], key=lambda row: self.tokens(row.prompt))
        self.fits: dict[str, Trained] = {}
        self.found: dict[str, Tried] = {}
        # answers to held-out rows, and how sure each is
        self.said: dict[str, tuple[list[str], list[float]]] = {}
        self.told = ""  # how long all training will take, until it is said
        self.troubles: list[str] = []  # sentences about runs of which a loss was not finite
        self.answers: dict[int, list[Row]] = {}
        parts = prompts if prompts <= ALONE else min(options.folds, prompts)
        folds = draw_folds(rows, parts, self.shown, options.seed)
        self.folds = [
            replace(fold, **self.unlabelled(number, fold.train))
            for number, fold in enumerate(folds)
        ]
        tests = [fold.test for fold in self.folds]
        self.places = torch.tensor(sum(tests, [])).argsort().tolist()  # of rows, fold after fold
        self.selection = Selection(tests, self.gold, options.temperature)

    @property
    def names(self) -> list[str]:
        """Every way to answer that is tried."""
        probe = ["probe"] if self.task.labels else []
        return ["base", "icl", *probe, *self.options.methods]

    def unlabelled(self, number: int, train: list[Example]) -> dict:
        """The rows without answers and the demonstrations before each, as fields of an episode."""
        if not self.more:
            return {}
        asked = {row.prompt for row in self.more}
        others = [row for row in train if row.prompt not in asked]
        shown = self.shown(others or train, seeded(self.options.seed, number, "unlabelled"))
        return {"unlabelled": self.more, "more_demonstrations": [shown] * len(self.more)}

    def shown(self, rows: list[Example], rng) -> list[Example]:
        """What the teacher sees before a row: some of `rows`, or the context."""
        if self.options.context:
            if shown := self.cut([Example(self.options.context, "")]):
                return shown
            raise UsageError(
                f"the context leaves no room for {self.longest.prompt[:60]!r} in what the model reads; cut it"
            )
        return self.cut(balanced(rows, self.options.demonstrations, rng))

    def cut(self, shown: list[Example]) -> list[Example]:
        """The first of the demonstrations that fit into the model's context before the longest row and its answer."""
        row = self.longest
        needed = self.tokens(row.prompt) + self.max_tokens - 1
        self.subject.check_room(row.prompt, needed)
        taken = accumulate(self.tokens(f"{e.prompt}{e.answer}\n\n") for e in shown)
        room = self.subject.reads - needed
        return [example for example, tokens in zip(shown, taken) if tokens <= room]

    def grid(self, episodes: list[Episode], rates, methods: tuple[str, ...]) -> Grid:
        """Every episode with every rate, after the teacher's pass over them where a method learns from it."""
        o, subject = self.options, self.subject
        needed = losses_of(methods)
        asked = Asked(
            self.max_tokens,
            SOFT_K if "soft" in needed else None,
            self.layers,
            self.stop,
            residual="hidden" in needed,
            hooks=fast_decoding(device_of(subject.model), self.max_tokens),
        )
        if needed == {"sft"}:
            of_text = self.max_tokens > 1
            sets = [true_rows(subject.tokenizer, episode, of_text) for episode in episodes]
        else:
            with self.bar("collecting", sum(len(e.demonstrations) for e in episodes)) as bar:
                told = partial(
                    teach, subject.model, subject.tokenizer, asked=asked, watch=bar.update
                )
                sets = ranks.spread(told, episodes)
        return Grid(
            subject.model,
            self.adapter,
            sets,
            rates,
            seed=o.seed,
            settings=Settings(o.batch_size, o.epochs, layers=self.layers),
            trainer=make_trainer(None),
        )

    @cached_property
    def fold_grid(self) -> Grid:
        grid = self.grid(self.folds, self.rates, self.options.methods)
        self.estimate(grid)
        return grid

    def steps(self, grid: Grid, method: str) -> int:
        """Steps of a method's last phase."""
        rows = grid.sets[0].train if last_phase(method) == "sft" else grid.sets[0].icl_train
        return self.options.epochs * math.ceil(len(rows) / self.options.batch_size)

    def estimate(self, grid: Grid) -> None:
        """How long all training will take, from one timed step: the first bar says it."""
        one = replace(grid, settings=replace(grid.settings, steps=1), hooks=Hooks(in_batches))
        METHODS["sft"](one)  # the first is slower
        begun = time.perf_counter()
        METHODS["sft"](one)
        seconds = time.perf_counter() - begun
        steps = sum(self.steps(grid, method) for method in in_order(self.options.methods))
        final = 1 + 2 / len(self.rates) / len(self.folds)  # then the chosen one on all rows
        self.told = f" (all training: about {duration(seconds * steps * final)})"

    def train_phase(self, grid: Grid, method: str, first: Trained | None) -> Trained:
        """One method on a grid, from the phase `first` that it starts from."""
        label = f"training {method}{self.told}"
        self.told = ""
        with self.bar(label, self.steps(grid, method)) as bar:

            def looked(state: State) -> bool:
                bar.update(state.step - bar.n)
                return False

            record = partial(recorded, device=device_of(self.subject.model))
            grid = replace(grid, hooks=Hooks(in_batches, record, looked))
            return METHODS[method](grid) if first is None else METHODS[method](grid, first)

    def trained(self, method: str) -> Trained:
        """All folds × rates of a method; kept, so that an interrupted fit goes on."""
        assert method in in_order(self.options.methods), "the teacher was not asked for it"
        if method not in self.fits:
            first = self.trained(STARTS_FROM[method]) if method in STARTS_FROM else None
            kept = self.once(
                f"fit-{method}", lambda: vars(self.train_phase(self.fold_grid, method, first))
            )
            theta = kept["theta"].to(device_of(self.subject.model))
            self.fits[method] = Trained(**{**kept, "theta": theta})
        return self.fits[method]

    def score(
        self, student: Callable, prompts: list[list[int]], number: int, runs: int = 1
    ) -> Tensor:
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
                with self.answering("icl", number, None) as (teacher, prompts):
                    observe(teacher, rows, prompts, Asked(self.max_tokens + 1, SOFT_K))
            self.answers[number] = rows
        return self.answers[number]

    @contextmanager
    def answering(self, name: str, number: int, theta: Tensor | None) -> Iterator[tuple]:
        """The model that answers what fold `number` held out, and its prompts.

        Under adapters `theta` [runs, M]; None: the base, or ICL.
        """
        model, tokenizer = self.subject.model, self.subject.tokenizer
        texts = [self.rows[i].prompt for i in self.folds[number].test]
        if theta is None:
            shown = self.folds[number].icl if name == "icl" else [[]]
            yield share_prefix(model, tokenizer, shown, texts)
            return
        with adapted(model, self.adapter, theta) as student:
            yield student, tokenizer.encode_all(texts)

    def held_out(self, name: str) -> Tensor:
        """What `name` says of every row that its fold held out, [S, n, C]."""
        if name == "probe":
            return held_out_scores(
                self.states, self.gold, self.selection.folds, len(self.task.labels)
            )
        theta = None
        if name in METHODS:
            theta = self.trained(name).theta.unflatten(0, (len(self.folds), -1))
        with self.bar(f"scoring {name}", len(self.rows)) as bar:

            def scored(number: int) -> Tensor:
                bar.update(len(self.folds[number].test))
                weights = None if theta is None else theta[number]
                with self.answering(name, number, weights) as (student, prompts):
                    return self.score(
                        student, prompts, number, 1 if theta is None else len(weights)
                    )

            parts = ranks.spread(scored, range(len(self.folds)))
        scores = torch.cat(parts, 1)[:, self.places]
        finite = scores.isfinite().all(-1, keepdim=True)
        return torch.where(finite, scores, -torch.inf) if name in METHODS else scores

    def tried(self, name: str) -> Tried:
        """What `name` says of held-out rows; kept, so that an interrupted fit goes on."""
        if name not in self.found:
            kept = self.once(f"held-out-{name}", lambda: {"scores": self.held_out(name)})
            self.found[name] = found = Tried(name, kept["scores"])
            if name in METHODS:
                self.warn(found)
            if not self.task.labels:
                unread = replace(found, right=torch.zeros(len(self.rows), dtype=torch.bool))
                self.said[name] = self.texts(self.selection.judge(unread, range(len(self.folds))))
                texts, _ = self.said[name]
                right = [
                    same_answer(self.task.parser, text, row.answer)
                    for text, row in zip(texts, self.rows)
                ]
                found.right = torch.tensor(right)
        return self.found[name]

    def warn(self, tried: Tried) -> None:
        """Note which runs have failed. Raises UsageError where no rate is left."""
        failed = (tried.scores == -torch.inf).any(-1)  # [S, n]
        by_fold = torch.stack([failed[:, rows].any(1) for rows in self.selection.folds])
        bad = by_fold.flatten()  # [R]
        steps = self.steps(self.fold_grid, tried.name) if bad.any() else 0
        runs = Trained(
            theta=torch.zeros(0),
            dev_loss=torch.where(bad, torch.inf, 0.0),
            steps=bad * steps,
            best=torch.zeros(len(bad), dtype=torch.int64),
            broken=bad * steps,
        )
        names = [
            f"fold {fold} at rate {rate:g}"
            for fold, rate in product(range(len(self.folds)), self.rates)
        ]
        self.troubles += warn_of_failed(tried.name, runs, names, len(self.folds))

    def texts(self, candidate: Candidate) -> tuple[list[str], list[float]]:
        """What a candidate answers to every held-out row, greedily, and how sure it is."""
        tokenizer = self.subject.tokenizer
        hooks = fast_decoding(device_of(self.subject.model), self.max_tokens)
        how = Decoding(self.max_tokens, self.stop, hooks=hooks)
        theta = None
        if candidate.name in METHODS:
            settings = [candidate.picks[fold] for fold in range(len(self.folds))]
            theta = self.trained(candidate.name).theta.unflatten(0, (len(self.folds), -1))
            theta = theta[range(len(self.folds)), settings]  # [F, M]
        with self.bar(f"answers of {candidate.name}", len(self.rows)) as bar:

            def answers(number: int) -> tuple:
                weights = None if theta is None else theta[number][None]
                with self.answering(candidate.name, number, weights) as (student, prompts):
                    return answer_texts(student, tokenizer, prompts, how, bar.update)

            parts = ranks.spread(answers, range(len(self.folds)))
        said, sure = (sum(part, []) for part in zip(*parts))
        texts = [said[i].removeprefix(self.task.blank) for i in self.places]
        return texts, [sure[i] for i in self.places]

    @cached_property
    def states(self) -> Tensor:
        """The base's last hidden state at the end of every row's prompt, [n, D]."""
        prompts = self.subject.tokenizer.encode_all([row.prompt for row in self.rows])
        return last_states(self.subject.model, prompts)

    def final_probe(self, winner: Candidate) -> Probe:
        """The probe of every row."""
        labels = len(self.task.labels)
        return fit_probe(self.states, self.gold, labels, PENALTIES[winner.setting])

    def final(self, winner: Candidate) -> Tensor:
        """Weights [1, M] of the winner, trained on every row at its rate for the same number of epochs."""
        rows, rate = self.rows, self.rates[winner.setting]
        number = len(self.folds)
        shown = among_themselves(rows, self.shown, seeded(self.options.seed, number, "final"))
        everything = Episode(rows, [], shown, [], **self.unlabelled(number, rows))
        grid = self.grid([everything], [rate], (winner.name,))
        found = None
        for method in in_order((winner.name,)):
            found = self.train_phase(grid, method, found)
        theta = found.theta
        if not theta.isfinite().all():
            mend = "use lower --rates or --dtype float32"
            raise UsageError(
                f"{winner.name} at rate {rate:g} diverged when trained on every row; {mend}"
            )
        return theta


def check_methods(methods: tuple[str, ...]) -> None:
    """Raises UsageError for what is no method, and where there is none."""
    unknown = [name for name in methods if name not in METHODS or name in BEHIND_DEMONSTRATIONS]
    if unknown:
        known = ", ".join(name for name in METHODS if name not in BEHIND_DEMONSTRATIONS)
        raise UsageError(
            f"--methods {unknown[0]}: unknown; beside base, ICL and probe can be tried {known}"
        )
    if not methods:
        raise UsageError("--methods: give at least one")


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
