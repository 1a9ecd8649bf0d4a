"""The few-shot sets of one task at one N with one adapter: drawn, checked, taught, trained, and the rate chosen."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from .adapters import adapted, make_adapter
from .batch import Row
from .episode import Episode, controlled, draw_episode, with_demonstrations
from .evaluate import answer_scores
from .generate import STOP
from .methods import BEGINS_WITH, METHODS, Grid, configs
from .models.common import device_of
from .options import BETAS, UNTRAINED, AdapterOptions, Options, phases
from .report.summary import at_config, chosen, dashed
from .runs import RunFolder
from .study import UsageError, parallel
from .subject import Subject
from .tasks import Examples, Task, find_task
from .teacher import Asked, Taught, answer_tokens_at_most, label_tokens_at_most, teach
from .train import Settings, Trained, warn_of_failed

FURTHER = 16  # queries a set by which `--select kl` judges


@dataclass
class Setting:
    """What all experiments of a study share, and how their progress is shown."""

    subject: Subject
    options: Options
    side_by_side: int | None  # runs trained together; None: all
    pools: dict[str, Examples]  # of every task
    evals: dict[str, Examples]  # of every evaluation
    budget: int = 4096  # tokens in one forward pass
    phases: tuple[str, ...] = ()  # of the whole study, in order
    folder: RunFolder | None = None  # this and the bar are missing while a study is only laid out
    bar: Callable | None = None  # bar(label, total) -> context manager yielding a tqdm


class FewShotSets:
    """One task at one N with one adapter; what does not depend on the adapter is shared among `variants`."""

    def __init__(self, setting: Setting, task: Task, n: int, more: int):
        if task.files and not task.labels:  # one's own texts: the longest answer says how long one may become
            answered = setting.pools[task.name].rows + setting.evals[task.name].rows
            task = replace(task, max_tokens=answer_tokens_at_most(setting.subject.tokenizer, answered))
        self.setting, self.task, o = setting, task, setting.options
        self.evals = evals = {name: setting.evals[name] for name in task.evals}
        self.about: dict = {"task": task.name, "n": n, "unlabelled": more}  # of every record
        self.name = f"{task.name}-n{n}" + f"-unlabelled{more}" * (more > 0)
        self.labelled, subject = bool(task.labels), setting.subject
        queries = max(len(e.rows) for e in evals.values()) if o.icl_demos == "pool" or o.paper_compat else 0
        self.draw = partial(self.drawn, n=n, seed=o.seed, pool_demos=queries, reuse=o.paper_compat)
        self.episodes = [self.draw(i, more=more) for i in range(o.sets)]
        self.labels: dict[str, list[list[int]]] = {}  # of each evaluation; merging ones are found before any work
        for name, examples in evals.items() if self.labelled else ():
            self.labels[name] = subject.tokenizer.label_tokens(examples.rows[0].prompt, self.find(name).labels)
        self.max_tokens = label_tokens_at_most(self.labels[task.name]) if self.labelled else task.max_tokens
        self.teacher_tokens = task.teacher_tokens or self.max_tokens
        if self.max_tokens > 1 and not subject.tokenizer.eos_ids:
            lack = "its answers end with EOS, but the checkpoint's config.json names no eos_token_id"
            raise UsageError(f"{task.name}: {lack}; add it there")
        self.layers = o.layer_numbers(subject.model.config.num_hidden_layers)
        self.betas = o.betas or BETAS[subject.model.config.model_type]
        self.taught: list[Taught] = []
        self.judged: list[Taught] = []
        self.references: dict[str, tuple] = {}
        self.take(o.adapters[0])
        self.check_lengths()

    def take(self, kind: AdapterOptions) -> None:
        """Have an adapter, and nothing trained of it yet."""
        o, subject = self.setting.options, self.setting.subject
        self.kind, self.adapter = kind, make_adapter(subject.model, kind, o.paper_compat)
        self.rates, self.records = o.rates_for(subject.name, kind.adapter), {}
        vars(self).pop("grid", None)
        self.trains = self.name + f"-{dashed(kind.name)}" * (len(o.adapters) > 1)  # as `name`, of what is trained

    @property
    def first(self) -> bool:
        """Whether what has no adapter is scored here."""
        return self.kind == self.setting.options.adapters[0]

    @property
    def methods(self) -> list[str]:
        """Those that are scored here."""
        return [method for method in self.setting.options.methods if self.first or method not in UNTRAINED]

    def place(self, method: str) -> str:
        """The folder of what belongs to a method: what has no adapter is in the one that variants share."""
        return self.name if method in UNTRAINED else self.trains

    def drawn(self, number: int, **how) -> Episode:
        """Set `number`; where `--teacher` asks for a control, the teacher sees something else."""
        pools, teacher = self.setting.pools, self.setting.options.teacher
        names = list(pools)
        another = pools[names[(names.index(self.task.name) + 1) % len(names)]]
        draw: Callable = partial(draw_episode, number=number, **how)
        return controlled(draw(pools[self.task.name].rows), teacher, lambda: draw(another.rows), how["seed"] + number)

    def check_lengths(self) -> None:
        """Refuse a row that is longer than the model reads, and one whose teacher's prompt is; warn where ICL's are."""
        o, subject, count = self.setting.options, self.setting.subject, self.setting.subject.tokenizer.count
        taught = phases(o.methods) - {*UNTRAINED, *["sft"] * (o.labels == "truth")}
        more = self.teacher_tokens - 1
        for e in [*self.episodes, *(self.further() if o.select == "kl" else ())]:
            rows, shown = e.train + e.dev + e.unlabelled, e.demonstrations + e.more_demonstrations
            for row, tokens in zip(rows, count([row.prompt + row.answer for row in rows])):
                subject.check_room(row.prompt, tokens)
            full = [with_demonstrations(d, row.prompt) for d, row in zip(shown, rows)] if taught else []
            for row, tokens in zip(rows, count(full)):
                subject.check_room(row.prompt, tokens + more, "behind its demonstrations: use a smaller --n")
        for name, examples in self.evals.items():
            more = label_tokens_at_most(self.labels[name]) if self.labelled else self.find(name).max_tokens
            lengths = [tokens + more - 1 for tokens in count([row.prompt for row in examples.rows])]
            for row, tokens in zip(examples.rows, lengths):
                subject.check_room(row.prompt, tokens)
            shown = [count([with_demonstrations(d, "") for d in e.icl]) for e in self.episodes]
            long = max(each[i % len(each)] + tokens for each in shown for i, tokens in enumerate(lengths))
            if long > subject.reads:
                said = f"rows of {name} need up to {long} tokens behind demonstrations; the model reads {subject.reads}"
                warnings.warn(f"{self.name}: {said}: ICL is not at its best, a smaller --n would fit", stacklevel=2)

    def find(self, name: str) -> Task:
        """The task called `name`; one's own needs no entry in the catalog."""
        return self.task if name == self.task.name else find_task(name)

    def phases(self) -> list[str]:
        """What is done, in order, as `stage` says it."""
        first, found = self.first, []  # of several adapters the first has the phases that they share
        for method in self.methods:
            if method not in UNTRAINED:
                found += ["collecting"] * first + [f"training {m}" for m in (BEGINS_WITH.get(method), method) if m]
                judged = self.setting.options.select == "kl" and method not in ("sft", "sft-sft")
                found += ["collecting further queries"] * (first and judged)
            found += [f"{who} on {name}" for name in self.evals for who in ["icl"] * first + [method]]
        return [f"{self.trains}: {phase}" for phase in dict.fromkeys(found)]

    @contextmanager
    def stage(self, kind: str, phase: str, total: int) -> Iterator:
        """Count the seconds of the block towards `kind`, under a bar that says which phase of how many it is."""
        named, phases = f"{self.trains}: {phase}", self.setting.phases
        number = f"{phases.index(named) + 1}/{len(phases)} " if named in phases else ""
        with self.setting.folder.stage(kind, phase), self.setting.bar(number + named, total) as bar:
            yield bar

    def teach(self) -> list[Taught]:
        """Every set after the teacher's pass over it."""
        if not self.taught:
            o = self.setting.options
            needed, stop = phases(o.methods), None if o.paper_compat else STOP
            kept = self.setting.subject.model.config.vocab_size if o.paper_compat else o.soft_k
            soft_k = kept if "soft" in needed else None
            asked = Asked(self.teacher_tokens, soft_k, self.layers, stop, self.setting.budget, "hidden" in needed)
            self.taught += self.told("collecting", self.episodes, asked)
        return self.taught

    def told(self, phase: str, episodes: list[Episode], asked: Asked) -> list[Taught]:
        """What the teacher says to episodes, under a bar."""
        subject, rows = self.setting.subject, sum(len(e.train) + len(e.dev) for e in episodes)
        with self.stage("collect", phase, rows) as bar:
            ask = partial(teach, subject.model, subject.tokenizer, asked=asked, watch=bar.update)
            return parallel.spread(ask, episodes)

    @cached_property
    def grid(self) -> Grid:
        """All runs of the experiment."""
        setting, o = self.setting, self.setting.options
        compat = {"keep_last": o.paper_compat, "bfloat16_losses": o.paper_compat}
        settings = Settings(o.batch_size, o.epochs, o.patience, self.layers, **compat)
        model, sets = setting.subject.model, self.teach()
        grid = Grid(model, self.adapter, sets, self.rates, self.betas, o.seed, o.labels, settings)
        begun = {BEGINS_WITH.get(method) for method in o.methods}  # what goes on from every rate needs all of them
        race = [method for method in o.methods if method not in begun] if o.race and o.select == "dev" else []
        return replace(grid, side_by_side=setting.side_by_side, race=race, progress=self.training, first=self.trained)

    @contextmanager
    def training(self, about: tuple[str, int, int]) -> Iterator[Callable[[int, Tensor], None]]:
        """Show a phase of training: its runs still going and their best dev losses."""
        phase, runs, steps = about
        with self.stage("train", f"training {phase}", steps) as bar:

            def watch(step: int, dev_losses: Tensor) -> None:
                if len(dev_losses):
                    low, high = dev_losses.min().item(), dev_losses.max().item()
                    said = f"{len(dev_losses)} of {runs} runs going, dev loss {low:.3g} to {high:.3g}"
                    bar.set_postfix_str(said, refresh=False)
                bar.update(step - bar.n)

            yield watch

    def trained(self, method: str) -> Trained:
        """The trained runs of a method; a phase that methods share is trained once."""
        tensors = self.setting.folder.once(f"{self.trains}/fit-{method}", lambda: vars(METHODS[method](self.grid)))
        found = Trained(**tensors | {"theta": tensors["theta"].to(device_of(self.setting.subject.model))})
        runs = configs(method, len(self.episodes), self.rates, self.betas)
        names = [f"set {number} at rate {rate:g}" + f" β {beta}" * (beta is not None) for number, rate, beta in runs]
        warn_of_failed(f"{self.trains}, {method}", found, names, len(self.episodes))
        return found

    def training_records(self, method: str) -> list[dict]:
        """Rate, β, dev loss and steps of each of a method's runs."""
        if method not in self.records:
            about, found, records = self.about | {"method": method, "adapter": self.kind.name}, self.trained(method), []
            o = self.setting.options
            kl = self.divergences(method).tolist() if o.select == "kl" and method not in ("sft", "sft-sft") else []
            troubles = found.troubles()
            for r, (number, rate, beta) in enumerate(configs(method, len(self.episodes), self.rates, self.betas)):
                record = {"set": number, "rate": rate, "beta": beta, "dev_loss": found.dev_loss[r].item()}
                record |= {"steps": int(found.steps[r]), "trouble": troubles[r]}
                records.append(about | record | ({"kl": kl[r]} if kl else {}))
            self.records[method] = records
        return self.records[method]

    def further(self) -> list[Episode]:
        """For each set queries that no phase sees, its rows as demonstrations. Raises UsageError for a small pool."""
        more = self.about["unlabelled"]
        drawn = [self.draw(number, more=more + FURTHER) for number in range(len(self.episodes))]
        return [Episode(e.unlabelled[more:], [], e.more_demonstrations[more:], []) for e in drawn]

    def judges(self) -> list[list[Row]]:
        """The `further` queries as the teacher answers them, with its distributions."""
        if not self.judged:
            asked = Asked(self.teacher_tokens, self.setting.options.soft_k)
            self.judged += self.told("collecting further queries", self.further(), asked)
        return [taught.icl_train for taught in self.judged]

    def divergences(self, method: str) -> Tensor:
        """Mean KL [R] from the teacher to each of a method's runs on the `judges` of its set."""

        def make() -> dict[str, Tensor]:
            found = []
            for rows, theta in zip(self.judges(), self.trained(method).theta.chunk(len(self.episodes))):
                with adapted(self.setting.subject.model, self.adapter, theta) as student:
                    found.append(-answer_scores(student, rows, len(theta)).mean(1))
            return {"kl": torch.cat(found)}

        return self.setting.folder.once(f"{self.trains}/kl-{method}", make)["kl"]

    def reported(self, method: str) -> list[int]:
        """Which of a method's runs are scored: those of the rate (and β) chosen without evaluation rows, or of all.

        Not those of a rate that failed in some set: it cannot be chosen.
        """
        records, select = self.training_records(method), self.setting.options.select
        if select in ("dev", "kl"):
            return at_config(records, chosen(records, select))
        whole = self.trained(method).dev_loss.isfinite().view(len(self.episodes), -1).all(0)
        return whole.repeat(len(self.episodes)).nonzero()[:, 0].tolist()
