"""One task at one N on one model: its sets are taught, trained and scored, each once, and kept in the run's folder."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

from . import UsageError, parallel
from .adapters import Adapter, adapted, make_adapter
from .batch import Row
from .episode import Episode, controlled, draw_episode, with_demonstrations
from .evaluate import Scoring, answer_scores, label_scores, layer_asim, share_prefix
from .generate import STOP, Decoding, generate
from .methods import BEGINS_WITH, METHODS, Grid, configs
from .metrics import fit_temperature
from .models.common import device_of
from .options import BETAS, UNTRAINED, Options, phases
from .report.summary import at_config, chosen
from .runs import RunFolder
from .subject import Subject
from .tasks import Example, Examples, Task, find_task, same_answer
from .teacher import Asked, answer_tokens_at_most, label_tokens_at_most, observe, teach
from .train import Settings, Trained, warn_of_failed

FURTHER = 16  # queries a set by which `--select kl` judges


@dataclass
class Setting:
    """What all experiments of a study share, and how their progress is shown."""

    subject: Subject
    options: Options
    folder: RunFolder | None  # None: only laid out
    bar: Callable  # bar(label, total) -> context manager yielding a tqdm
    side_by_side: int | None = None  # runs trained together; None: all
    pools: dict[str, Examples] = field(default_factory=dict)  # of every task
    budget: int = 4096  # tokens in one forward pass
    phases: tuple[str, ...] = ()  # of the whole study, in order


class Experiment:
    """One task at one N."""

    def __init__(self, setting: Setting, task: Task, n: int, more: int, evals: dict[str, Examples]):
        pool = setting.pools[task.name]
        if task.files and not task.labels:  # one's own texts: the longest answer says how long one may become
            answered = pool.rows + evals[task.name].rows
            task = replace(task, max_tokens=answer_tokens_at_most(setting.subject.tokenizer, answered))
        self.setting, self.task, o = setting, task, setting.options
        self.evals = evals = {name: evals[name] for name in task.evals}
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
        if self.max_tokens > 1 and not subject.tokenizer.eos_ids:
            lack = "its answers end with EOS, but the checkpoint's config.json names no eos_token_id"
            raise UsageError(f"{task.name}: {lack}; add it there")
        self.adapter: Adapter = make_adapter(subject.model, o, o.paper_compat)
        self.layers = o.layer_numbers(subject.model.config.num_hidden_layers)
        self.check_lengths()
        self.rates = o.rates_for(subject.name)
        self.betas = o.betas or BETAS[subject.model.config.model_type]
        self.references: dict[str, tuple] = {}
        self.records: dict[str, list[dict]] = {}

    def drawn(self, number: int, **how) -> Episode:
        """Set `number`; where `--teacher` asks for a control, the teacher sees something else."""
        pools, teacher = self.setting.pools, self.setting.options.teacher
        names = list(pools)
        another = pools[names[(names.index(self.task.name) + 1) % len(names)]]
        episode = draw_episode(pools[self.task.name].rows, number=number, **how)
        return controlled(
            episode, teacher, lambda: draw_episode(another.rows, number=number, **how), how["seed"] + number
        )

    def check_lengths(self) -> None:
        """Refuse a row that is longer than the model reads, and one whose teacher's prompt is; warn where ICL's are."""
        o, subject, count = self.setting.options, self.setting.subject, self.setting.subject.tokenizer.count
        taught = phases(o.methods) - {*UNTRAINED, *["sft"] * (o.labels == "truth")}
        more = self.max_tokens - 1
        for e in [*self.episodes, *(self.further() if o.select == "kl" else ())]:
            rows, shown = e.train + e.dev + e.unlabelled, e.demonstrations + e.more_demonstrations
            for row, tokens in zip(rows, count([row.prompt + row.answer for row in rows])):
                subject.check_room(row.prompt, tokens + self.adapter.tokens)
            full = [with_demonstrations(d, row.prompt) for d, row in zip(shown, rows)] if taught else []
            for row, tokens in zip(rows, count(full)):
                subject.check_room(row.prompt, tokens + more, "behind its demonstrations: use a smaller --n")
        for name, examples in self.evals.items():
            more = label_tokens_at_most(self.labels[name]) if self.labelled else self.find(name).max_tokens
            lengths = [tokens + more - 1 for tokens in count([row.prompt for row in examples.rows])]
            for row, tokens in zip(examples.rows, lengths):
                subject.check_room(row.prompt, tokens + self.adapter.tokens)
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
        found = []
        for method in self.setting.options.methods:
            if method not in UNTRAINED:
                found += ["collecting", *(f"training {m}" for m in (BEGINS_WITH.get(method), method) if m)]
            found += [f"{who} on {name}" for name in self.evals for who in ("icl", method)]
        return [f"{self.name}: {phase}" for phase in dict.fromkeys(found)]

    @contextmanager
    def stage(self, kind: str, phase: str, total: int) -> Iterator:
        """Count the seconds of the block towards `kind`, under a bar that says which phase of how many it is."""
        phase, phases = f"{self.name}: {phase}", self.setting.phases
        number = f"{phases.index(phase) + 1}/{len(phases)} " if phase in phases else ""
        with self.setting.folder.stage(kind), self.setting.bar(number + phase, total) as bar:
            yield bar

    @cached_property
    def grid(self) -> Grid:
        """All runs of the experiment, after the teacher's pass over every set."""
        subject, o, budget = self.setting.subject, self.setting.options, self.setting.budget
        needed, layers = phases(o.methods), self.layers
        soft_k, stop = o.soft_k if "soft" in needed else None, None if o.paper_compat else STOP
        asked = Asked(self.max_tokens, soft_k, layers, stop, budget, "hidden" in needed)
        rows = sum(len(e.train) + len(e.dev) for e in self.episodes)
        with self.stage("collect", "collecting", rows) as bar:
            told = partial(teach, subject.model, subject.tokenizer, asked=asked, watch=bar.update)
            sets = parallel.spread(told, self.episodes)
        settings = Settings(o.batch_size, o.epochs, o.patience, layers, keep_last=o.paper_compat)
        grid = Grid(subject.model, self.adapter, sets, self.rates, self.betas, o.seed, o.labels, settings)
        begun = {BEGINS_WITH.get(method) for method in o.methods}  # what goes on from every rate needs all of them
        race = [method for method in o.methods if method not in begun] if o.race and o.select == "dev" else []
        grid = replace(grid, side_by_side=self.setting.side_by_side, race=race)
        return replace(grid, progress=self.training, first=self.trained)

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
        tensors = self.setting.folder.once(f"{self.name}/fit-{method}", lambda: vars(METHODS[method](self.grid)))
        found = Trained(**tensors | {"theta": tensors["theta"].to(device_of(self.setting.subject.model))})
        runs = configs(method, len(self.episodes), self.rates, self.betas)
        names = [f"set {number} at rate {rate:g}" + f" β {beta}" * (beta is not None) for number, rate, beta in runs]
        warn_of_failed(f"{self.name}, {method}", found, names, len(self.episodes))
        return found

    def training_records(self, method: str) -> list[dict]:
        """Rate, β, dev loss and steps of each of a method's runs."""
        if method not in self.records:
            about, found, records = self.about | {"method": method}, self.trained(method), []
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

    @cached_property
    def judges(self) -> list[list[Row]]:
        """The `further` queries as the teacher answers them, with its distributions."""
        subject, asked = self.setting.subject, Asked(self.max_tokens, self.setting.options.soft_k)
        with self.stage("collect", "collecting further queries", FURTHER * len(self.episodes)) as bar:
            told = partial(teach, subject.model, subject.tokenizer, asked=asked, watch=bar.update)
            sets = parallel.spread(told, self.further())
        return [taught.icl_train for taught in sets]

    def divergences(self, method: str) -> Tensor:
        """Mean KL [R] from the teacher to each of a method's runs on the `judges` of its set."""

        def make() -> dict[str, Tensor]:
            found = []
            for rows, theta in zip(self.judges, self.trained(method).theta.chunk(len(self.judges))):
                with adapted(self.setting.subject.model, self.adapter, theta) as student:
                    found.append(-answer_scores(student, rows, len(theta)).mean(1))
            return {"kl": torch.cat(found)}

        return self.setting.folder.once(f"{self.name}/kl-{method}", make)["kl"]

    def reported(self, method: str) -> list[int]:
        """Which of a method's runs are scored: those of the rate (and β) chosen without evaluation rows, or of all.

        Not those of a rate that failed in some set: it cannot be chosen.
        """
        records, select = self.training_records(method), self.setting.options.select
        if select in ("dev", "kl"):
            return at_config(records, chosen(records, select))
        whole = self.trained(method).dev_loss.isfinite().view(len(self.episodes), -1).all(0)
        return whole.repeat(len(self.episodes)).nonzero()[:, 0].tolist()

    def prompts(self, rows: list[Example], number: int | None = None) -> tuple[Callable, list[list[int]]]:
        """The model and the prompts of rows, without demonstrations or with those of set `number`."""
        subject, queries = self.setting.subject, [e.prompt for e in rows]
        if number is None:
            return subject.model, subject.tokenizer.encode_all(queries)
        return share_prefix(subject.model, subject.tokenizer, self.episodes[number].icl, queries)

    def reference(self, name: str) -> tuple[list[dict[str, Tensor]], Any]:
        """The base's scores with each set's demonstrations, and its outputs: [L, sets, rows, D], of texts in rows."""
        if name not in self.references:
            o, parts, alike = self.setting.options, [], []
            rows, every = self.evals[name].rows, "icl" in o.methods
            plain = self.prompts(rows)[1][: o.asim_rows]
            count = len(rows if every else plain)
            with self.stage("evaluate", f"icl on {name}", count * len(self.episodes)) as bar:
                for number in range(len(self.episodes)):
                    model, prompts = self.prompts(rows, number)
                    if self.labelled:
                        part = self.score_labels(name, model, prompts[:count], bar, Scoring(keep=o.asim_rows))
                        alike.append(part.pop("outputs"))
                    else:
                        (responses,), correct = self.score_texts(name, model, prompts[:count], bar, [f"icl-{number}"])
                        part = {"correct": correct}
                        alike.append([Row(p, self.ended(r)) for p, r in zip(plain, responses)])
                        asked = Asked(self.max_tokens, budget=self.setting.budget)
                        observe(model, alike[-1], prompts[: len(plain)], asked)
                    itself = {"asim": torch.ones(1, self.setting.subject.model.config.num_hidden_layers)}
                    parts.append(part | itself)
            self.references[name] = parts, torch.cat(alike, 1) if self.labelled else alike
        return self.references[name]

    def score(self, method: str, name: str) -> dict[str, Tensor]:
        """What `method`'s reported runs make of evaluation `name`: `asim` [R, L], `correct` [R, Q], labels' scores."""
        return self.setting.folder.once(f"{self.name}/{method}-on-{name}", lambda: self.evaluate(method, name))

    def evaluate(self, method: str, name: str) -> dict[str, Tensor]:
        references, alike = self.reference(name)
        if method == "icl":
            return joined(references)
        (model, prompts), runs = self.prompts(self.evals[name].rows), [0]
        under = nullcontext(model)
        if method not in UNTRAINED:
            runs = self.reported(method)
            under = adapted(model, self.adapter, self.trained(method).theta[runs])
        with self.stage("evaluate", f"{method} on {name}", len(runs) * len(prompts)) as bar, under as student:
            if self.labelled:
                return self.score_labels(name, student, prompts, bar, Scoring(len(runs), like=alike))
            responses, correct = self.score_texts(name, student, prompts, bar, [f"{method}-{r}" for r in runs])
            if method not in UNTRAINED:  # the base is compared with every set
                alike = [alike[self.training_records(method)[r]["set"]] for r in runs]
            return {"correct": correct, "asim": self.likeness(student, alike, responses)}

    def temperatures(self, method: str) -> list[float]:
        """For each of a method's scored runs (of base and ICL for each set) the one that suits its set's dev rows."""
        found, theta, sets = [], None, range(len(self.episodes))
        if method not in UNTRAINED:
            theta = self.trained(method).theta[self.reported(method)]
            sets = [self.training_records(method)[run]["set"] for run in self.reported(method)]
        for place, number in enumerate(sets):
            dev = self.episodes[number].dev
            model, prompts = self.prompts(dev, number if method == "icl" else None)
            under = nullcontext(model) if theta is None else adapted(model, self.adapter, theta[[place]])
            with under as student:
                scores = label_scores(student, prompts, self.labels[self.task.name]).logarithms[0]
            found.append(fit_temperature(scores, torch.tensor([e.label for e in dev])))
        return found

    def score_labels(self, name: str, model: Callable, prompts: list[list[int]], bar, how: Scoring) -> dict:
        """`label_scores` of `model` on evaluation `name`, and which rows are right."""
        o, examples = self.setting.options, self.evals[name].rows
        how = replace(how, among=10 if o.paper_compat else None, budget=self.setting.budget)
        scores = label_scores(model, prompts, self.labels[name], how, lambda queries: bar.update(queries * how.runs))
        correct = scores.top == torch.tensor([e.label for e in examples[: len(prompts)]])
        return {key: value for key, value in vars(scores).items() if value is not None} | {"correct": correct}

    def score_texts(self, name: str, model: Callable, prompts: list[list[int]], bar, runs: list[str]) -> tuple:
        """Greedy responses (ids) of `model`'s `runs` on evaluation `name`, and which are right, [R, Q].

        All runs answer side by side; each one's texts are kept in the folder.
        """
        task, tokenizer, Q = self.find(name), self.setting.subject.tokenizer, len(prompts)

        @cache
        def responses() -> list[list[int]]:
            how = Decoding(task.max_tokens, runs=len(runs), budget=4 * self.setting.budget)
            return generate(model, tokenizer, prompts, how, lambda queries: bar.update(queries * how.runs))

        def make(run: int) -> dict:
            ids = responses()[run * Q : (run + 1) * Q]
            kept = {"texts": [tokenizer.decode(i) for i in ids], "parser": task.parser, "ids": ids}
            return kept | {"answers": [e.answer for e in self.evals[name].rows[:Q]]}

        files = [self.texts_file(run, name) for run in runs]
        kept = [self.setting.folder.json_once(file, partial(make, run)) for run, file in enumerate(files)]
        return [texts["ids"] for texts in kept], torch.stack([parsed_correct(texts) for texts in kept])

    def texts_file(self, tag: str, name: str) -> str:
        return f"{self.name}/generations/{tag}-on-{name}.json"

    def likeness(self, model: Callable, like: list[list[Row]], responses: list[list[list[int]]]) -> Tensor:
        """asim of R runs to a list of rows each, [R, L]; as in the released scripts on the runs' own `responses`."""
        if self.setting.options.paper_compat:
            own = responses * (len(like) // len(responses))
            like = [[cut(row, self.ended(r)) for row, r in zip(rows, texts)] for rows, texts in zip(like, own)]
        return layer_asim(model, like, self.setting.budget)

    def ended(self, response: list[int]) -> list[int]:
        """A generated response with the end-of-sequence token, unless it was cut."""
        return (response + list(self.setting.subject.tokenizer.eos_ids[:1]))[: self.max_tokens]


def cut(row: Row, response: list[int]) -> Row:
    """The row with another response in place of its own, both cut to the shorter: what the released scripts compare."""
    response = response[: len(row.answer)]
    return Row(row.prompt, response, row.activations[:, : len(response)])


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The scores of several runs as one."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def parsed_correct(kept: dict) -> Tensor:
    """Whether each of the kept texts parses to the same as its true answer, [Q] bool."""
    return torch.tensor([same_answer(kept["parser"], t, a) for t, a in zip(kept["texts"], kept["answers"])])
