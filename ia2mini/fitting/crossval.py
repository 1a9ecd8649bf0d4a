"""Cross-validation of one's own rows: every method at every rate on every fold, judged by the rows a fold never saw.

The three steps of a study, over folds instead of sets: teach every fold, train every method at every rate side by side,
score what was held out. What is trained on true answers (SFT, also after another phase) is scored after every epoch;
what learns from the teacher alone stops by its own loss on a few rows of the fold.
"""

import math
import time
from collections.abc import Callable
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
from ..engine.experiment import make_trainer
from ..engine.options import FitOptions, last_phase, losses_of
from ..engine.subject import Subject
from ..episode import Episode, balanced, draw_folds, seeded, with_demonstrations
from ..generate import STOP, Decoding
from ..labels import Scoring, label_scores
from ..methods import METHODS, STARTS_FROM, Grid
from ..models.taps import device_of
from ..scale import ranks
from ..scale.decode import fast_decoding
from ..scale.graphs import recorded
from ..scale.pack import in_batches
from ..scoring import answer_scores, answer_texts, last_states, share_prefix
from ..tasks import Example, Task, same_answer
from ..teacher import Asked, label_tokens_at_most, observe, teach
from ..train import Hooks, Settings, State, Trained, go_on, warn_of_failed
from .looks import Looks, failures
from .probe import probe_scores
from .selection import Candidate, Selection, Tried

LEAST, ALONE = 4, 10  # rows that cross-validation needs; up to this many are left out one at a time
MINUTE = 60  # seconds; of less no estimate is given
SOFT_K = 1024  # likeliest tokens of a distribution that is matched


@dataclass
class CrossValidation:
    """Every method at every rate on every fold of one's rows, and what each says of the rows that the fold held out."""

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
        if unknown := [name for name in options.methods if name not in METHODS]:
            raise UsageError(
                f"--methods {unknown[0]}: unknown; beside base and ICL can be tried {', '.join(METHODS)}"
            )
        if not options.methods:
            raise UsageError("--methods: give at least one")
        if prompts < LEAST:
            needed = f"cross-validation needs at least {LEAST}; add rows"
            raise UsageError(f"{prompts} rows with different prompts: {needed}")
        self.labels = (
            subject.tokenizer.label_tokens(rows[0].prompt, task.labels) if task.labels else []
        )
        self.max_tokens = label_tokens_at_most(self.labels) if task.labels else task.max_tokens
        self.stop = None if options.chat else STOP
        self.gold = torch.tensor([row.label or 0 for row in rows])
        self.adapter = make_adapter(subject.model, options)
        self.layers = options.layer_numbers(subject.model.config.num_hidden_layers)
        self.rates = options.rates_for(subject.name, options.adapter)
        # each is asked for in every fold
        self.tokens = cache(lambda text: len(subject.tokenizer.encode(text)))
        self.longest = max(rows, key=lambda row: self.tokens(row.prompt))
        self.fits: dict[str, Trained] = {}
        self.found: dict[str, Tried] = {}
        self.seconds: float | None = None  # that scoring every row by the base has taken
        self.estimated = False  # whether it has been said how long training will take
        # answers to held-out rows, and how sure each is
        self.said: dict[str, tuple[list[str], list[float]]] = {}
        self.troubles: list[str] = []  # sentences about runs of which a loss was not finite
        self.answers: dict[int, list[Row]] = {}
        parts = prompts if prompts <= ALONE else min(options.folds, prompts)
        self.folds = draw_folds(rows, parts, self.shown, options.seed)
        self.folds = [
            replace(fold, **self.unlabelled(number, fold.train))
            for number, fold in enumerate(self.folds)
        ]
        # of rows, fold after fold
        self.places = torch.tensor(sum((f.test for f in self.folds), [])).argsort().tolist()
        tests = [fold.test for fold in self.folds]
        self.selection = Selection(tests, self.gold, options.patience, options.temperature)

    def unlabelled(self, number: int, train: list[Example]) -> dict:
        """The rows without answers and, after those of all others, their demonstrations, as fields of an episode."""
        rng = seeded(self.options.seed, number, "unlabelled")
        return {
            "unlabelled": self.more,
            "more_demonstrations": [self.shown(train, rng, row) for row in self.more],
        }

    def shown(self, rows: list[Example], rng, row: Example | None = None) -> list[Example]:
        """What the teacher sees before `row` (None: before every held-out row): others of `rows`, or the context."""
        longest = row or self.longest
        if self.options.context:
            if shown := self.cut([Example(self.options.context, "")], longest):
                return shown
            raise UsageError(
                f"the context leaves no room for {longest.prompt[:60]!r} in what the model reads; cut it"
            )
        return self.cut(
            balanced(rows, self.options.demonstrations, rng, row.prompt if row else None), longest
        )

    def cut(self, shown: list[Example], row: Example) -> list[Example]:
        """The first of the demonstrations that fit into the model's context before `row` and its answer."""
        needed = self.tokens(row.prompt) + self.max_tokens - 1
        self.subject.check_room(row.prompt, needed)
        taken = accumulate(self.tokens(f"{e.prompt}{e.answer}\n\n") for e in shown)
        return [
            example
            for example, tokens in zip(shown, taken)
            if needed + tokens <= self.subject.reads
        ]

    def train_phase(
        self, grid: Grid, method: str, first: Trained | None, after_look: Callable = go_on
    ) -> Trained:
        """One method on a grid, from the phase `first` that it starts from."""
        rows = (
            len(grid.sets[0].train) if last_phase(method) == "sft" else len(grid.sets[0].icl_train)
        )
        steps = grid.settings.steps or grid.settings.epochs * math.ceil(
            rows / grid.settings.batch_size
        )
        with self.bar(f"training {method}{self.estimate()}", steps) as bar:

            def looked(state: State) -> bool:
                bar.update(state.step - bar.n)
                return after_look(state)

            hooks = Hooks(
                in_batches, partial(recorded, device=device_of(self.subject.model)), looked
            )
            grid = replace(grid, hooks=hooks)
            return METHODS[method](grid) if first is None else METHODS[method](grid, first)

    def estimate(self) -> str:
        """How long all training will take, if that is minutes: from the seconds that scoring the base has taken."""
        if self.estimated or self.seconds is None:
            return ""
        self.estimated = True
        o, folds = self.options, len(self.folds)
        phases = {*o.methods, *(STARTS_FROM[name] for name in o.methods if name in STARTS_FROM)}
        # over all rows in an epoch: forward and backward in all folds but one; scoring
        passes = 3 * (folds - 1) + 1
        epoch = self.seconds * passes * len(self.rates) * len(phases)
        least, most = epoch * min(o.epochs, o.patience + 1), epoch * o.epochs
        if most < MINUTE:
            return ""
        return f" (all training: about {duration(least)} to {duration(most)})"

    def grid(self, episodes: list[Episode], rates) -> Grid:
        """Every episode with every rate, after the teacher's pass over them."""
        o, subject = self.options, self.subject
        needed, settings = (
            losses_of(o.methods),
            Settings(o.batch_size, o.epochs, o.patience, self.layers),
        )
        soft_k = SOFT_K if "soft" in needed else None
        asked = Asked(
            self.max_tokens,
            soft_k,
            self.layers,
            self.stop,
            residual="hidden" in needed,
            hooks=fast_decoding(device_of(subject.model), self.max_tokens),
        )
        with self.bar("collecting", sum(len(e.demonstrations) for e in episodes)) as bar:
            told = partial(teach, subject.model, subject.tokenizer, asked=asked, watch=bar.update)
            sets = ranks.spread(told, episodes)
        return Grid(
            subject.model,
            self.adapter,
            sets,
            rates,
            seed=o.seed,
            settings=settings,
            trainer=make_trainer(None),
        )

    @cached_property
    def fold_grid(self) -> Grid:
        return self.grid(self.folds, self.rates)

    @property
    def whole_grid(self) -> Grid:
        """The same folds for what trains on true answers: the rows that decide when others stop train, too."""
        sets = [
            replace(taught, train=taught.train + taught.dev, dev=[])
            for taught in self.fold_grid.sets
        ]
        return replace(self.fold_grid, sets=sets)

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch of `whole_grid`."""
        fold = self.folds[0]
        return math.ceil((len(fold.train) + len(fold.dev)) / self.options.batch_size)

    def trained(self, method: str) -> Trained:
        """All folds × rates of a method, each for as many steps as suit it.

        What ends with true answers trains for the epochs that suit the other folds' rows at each rate.
        """
        if method not in self.fits:
            kept = self.once(f"fit-{method}", lambda: vars(self.train(method)))
            self.fits[method] = Trained(
                **kept | {"theta": kept["theta"].to(device_of(self.subject.model))}
            )
            if last_phase(method) != "sft":
                self.warn(method, self.fits[method])
        return self.fits[method]

    def train(self, method: str) -> Trained:
        if last_phase(method) != "sft":
            return self.train_phase(self.fold_grid, method, self.first_phase(method))
        losses = self.selection.losses(self.tried(method))
        epochs = []
        for fold in range(len(self.folds)):
            rows = self.selection.others(fold, range(len(self.folds)))
            epochs += [
                self.selection.pick(losses[:, [rate]], rows)[0] + 1
                for rate in range(len(self.rates))
            ]
        return self.train_for(method, torch.tensor(epochs))

    def train_for(self, method: str, epochs: Tensor) -> Trained:
        """All folds × rates of a method that ends with true answers, each for its number of `epochs` [R]."""
        steps = epochs * self.epoch_steps

        def until_its_epochs(state: State) -> bool:
            state.going &= state.step < steps[state.index]
            return False

        return self.train_phase(self.whole_grid, method, self.first_phase(method), until_its_epochs)

    def first_phase(self, method: str) -> Trained | None:
        """What a method starts from."""
        return self.trained(STARTS_FROM[method]) if method in STARTS_FROM else None

    def warn(self, method: str, found: Trained) -> None:
        """Note which runs had a loss that is not finite. Raises UsageError where no rate is left."""
        names = [
            f"fold {fold} at rate {rate:g}"
            for fold, rate in product(range(len(self.folds)), self.rates)
        ]
        self.troubles += warn_of_failed(method, found, names, len(self.folds))

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
                full = [
                    tokenizer.encode(with_demonstrations(fold.icl[0], self.rows[i].prompt))
                    for i in fold.test
                ]
                observe(self.subject.model, rows, full, Asked(self.max_tokens + 1, SOFT_K))
            self.answers[number] = rows
        return self.answers[number]

    def held_out_texts(self, number: int) -> list[str]:
        return [self.rows[i].prompt for i in self.folds[number].test]

    def adapted_scores(self, number: int, theta: Tensor) -> Tensor:
        """What adapters [runs, M] say of the rows that fold `number` held out, [runs, n, C]."""
        prompts = self.subject.tokenizer.encode_all(self.held_out_texts(number))
        with adapted(self.subject.model, self.adapter, theta) as student:
            return self.score(student, prompts, number, len(theta))

    def untrained_scores(self, name: str, number: int) -> Tensor:
        """The same of the base or ICL, [1, n, C]."""
        shown = self.folds[number].icl if name == "icl" else [[]]
        student, prompts = share_prefix(
            self.subject.model, self.subject.tokenizer, shown, self.held_out_texts(number)
        )
        return self.score(student, prompts, number)

    def held_out(self, name: str) -> Tensor:
        """What `name` says of every row that its fold held out, [epochs, rates, n, C]; of base and icl [1, 1, n, C]."""
        if name in METHODS and last_phase(name) == "sft":
            if name in STARTS_FROM:
                self.trained(STARTS_FROM[name])  # its bar comes first
            looks = Looks(self.adapted_scores, self.selection, len(self.rates), self.epoch_steps)
            self.train_phase(self.whole_grid, name, self.first_phase(name), looks)
            return looks.gathered()
        theta = None
        if name in METHODS:
            theta = self.trained(name).theta.unflatten(0, (len(self.folds), -1))
        with self.bar(f"scoring {name}", len(self.rows)) as bar:

            def scored(number: int) -> Tensor:
                bar.update(len(self.folds[number].test))
                if theta is None:
                    return self.untrained_scores(name, number)
                return self.adapted_scores(number, theta[number])

            parts = ranks.spread(scored, range(len(self.folds)))
        return torch.cat(parts, 1)[None, :, self.places]

    def tried(self, name: str) -> Tried:
        """What `name` says of held-out rows; kept, so that an interrupted fit goes on."""
        if name not in self.found:
            begun = time.perf_counter()
            scores = self.once(f"held-out-{name}", lambda: {"scores": self.held_out(name)})[
                "scores"
            ]
            if name == "base":
                self.seconds = time.perf_counter() - begun
            self.found[name] = found = Tried(name, scores)
            if name in METHODS and last_phase(name) == "sft":
                self.warn(name, failures(scores, self.selection.folds, self.epoch_steps))
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

    def texts(self, candidate: Candidate) -> tuple[list[str], list[float]]:
        """What a candidate answers to every held-out row, greedily, and how sure it is."""
        theta = self.weights(candidate) if candidate.name in METHODS else None
        tokenizer, how = (
            self.subject.tokenizer,
            Decoding(
                self.max_tokens,
                self.stop,
                hooks=fast_decoding(device_of(self.subject.model), self.max_tokens),
            ),
        )
        with self.bar(f"answers of {candidate.name}", len(self.rows)) as bar:

            def answers(number: int) -> tuple:
                model, texts = self.subject.model, self.held_out_texts(number)
                if theta is not None:
                    with adapted(model, self.adapter, theta[number][None]) as student:
                        return answer_texts(
                            student, tokenizer, tokenizer.encode_all(texts), how, bar.update
                        )
                shown = self.folds[number].icl if candidate.name == "icl" else [[]]
                student, prompts = share_prefix(model, tokenizer, shown, texts)
                return answer_texts(student, tokenizer, prompts, how, bar.update)

            parts = ranks.spread(answers, range(len(self.folds)))
        said, sure = (sum(part, []) for part in zip(*parts))
        return [said[i] for i in self.places], [sure[i] for i in self.places]

    def weights(self, candidate: Candidate) -> Tensor:
        """Each fold's weights [F, M] of a method, at the rate and after the epochs that its rows are judged with."""
        folds, rates = (
            len(self.folds),
            [candidate.picks[fold][1] for fold in range(len(self.folds))],
        )
        if last_phase(candidate.name) == "sft":
            # others leave after their first
            epochs = torch.zeros(folds, len(self.rates), dtype=torch.int64)
            for fold, (epoch, rate) in candidate.picks.items():
                epochs[fold, rate] = epoch + 1
            theta = self.train_for(candidate.name, epochs.flatten()).theta
        else:
            theta = self.trained(candidate.name).theta
        return theta.unflatten(0, (folds, -1))[range(folds), rates]

    def probe(self) -> Tensor | None:
        """What a linear probe on the base's last hidden state says, [n, C]; None without scikit-learn."""
        prompts = self.subject.tokenizer.encode_all([row.prompt for row in self.rows])
        states = last_states(self.subject.model, prompts)
        return probe_scores(states, self.gold, self.selection.folds, len(self.task.labels))

    def final(self, winner: Candidate) -> Tensor:
        """Weights [1, M] of the winner, trained on every row at its rate for its epochs.

        A phase that learns from the teacher alone trains for as many epochs as were best in the folds on average.
        """
        rows, o, rate = self.rows, self.options, winner.rate
        rng = seeded(o.seed, len(self.folds), "final")
        shown = [self.shown(rows, rng, row) for row in rows]
        everything = Episode(rows, [], shown, [], **self.unlabelled(len(self.folds), rows))
        grid = self.grid([everything], [self.rates[rate]])
        found = None
        for method in filter(None, (STARTS_FROM.get(winner.name), winner.name)):
            if last_phase(method) == "sft":
                epochs = winner.epoch + 1
                if method != winner.name:
                    epochs = self.mean_steps(method, rate) / self.epoch_steps
                now = math.ceil(len(rows) / o.batch_size)
            else:  # only the teacher answers rows without answers
                then = math.ceil((len(self.folds[0].train) + len(self.more)) / o.batch_size)
                epochs = self.mean_steps(method, rate) / then
                now = math.ceil((len(rows) + len(self.more)) / o.batch_size)
            settings = replace(grid.settings, steps=max(1, round(epochs * now)))
            found = self.train_phase(replace(grid, settings=settings), method, found)
        theta = found.theta
        if not theta.isfinite().all():
            mend = "use lower --rates or --dtype float32"
            raise UsageError(
                f"{winner.name} at rate {self.rates[rate]:g} diverged when trained on every row; {mend}"
            )
        return theta

    def mean_steps(self, method: str, rate: int) -> float:
        """Steps that were best in the folds at a rate, on average."""
        return self.trained(method).best.view(len(self.folds), -1)[:, rate].float().mean().item()


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 60 * MINUTE:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / MINUTE / 60:.1f} h"
