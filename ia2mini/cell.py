"""One cell of the paper's grid: its sets, the teacher's targets, every method's trained runs and their scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor, nn

from . import UsageError
from .adapters import ADAPTERS, Adapter, adapted
from .episode import Episode, Row, draw_episode, truth_row
from .evaluate import label_scores, layer_asim, share_prefix
from .generate import STOP, generate
from .runs import RunFolder
from .tasks import Examples, Task, find_task, parse_boxed, parse_hashes, parse_number, parse_text
from .teacher import observe, teach
from .tokenizer import Tokenizer
from .train import METHODS, Fit, Job, SetRows, Settings

UNTRAINED = ("base", "icl")
PARSERS = {parse.__name__: parse for parse in (parse_boxed, parse_hashes, parse_number, parse_text)}
RATES = {  # protocol section 4 for LoRA and (IA)3; ours for the others
    "lora": (1e-4, 3e-4, 1e-3),
    "ia3": (1e-3, 1e-2, 1e-1),
    "prompt": (1e-3, 1e-2, 1e-1),
    "prefix": (1e-3, 1e-2, 1e-1),
    "full": (1e-5, 3e-5, 1e-4),
}
TINY_RATES = RATES | {
    "lora": (1e-3, 3e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3),
}  # the embedded model is small: ten times the rates
BETAS = {"qwen3": (0.1, 0.5, 0.7, 0.9), "llama": (0.001, 0.01, 0.05, 0.5)}


@dataclass(frozen=True)
class Options:
    """Everything about an experiment that changes its numbers (but for task, N, data and checkpoint)."""

    methods: tuple[str, ...] = ("base", "icl", "sft", "ia2", "ia2-sft")
    sets: int = 5
    rates: tuple[float, ...] = ()  # (): the adapter's of RATES
    betas: tuple[float, ...] = ()  # (): the family's of BETAS
    adapter: str = "lora"
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ()  # matrices to adapt; (): the adapter's own
    virtual_tokens: int = 20  # of prompt and prefix tuning
    layers: tuple[int, ...] = ()  # layers to align; (): all
    labels: str = "truth"  # what cross-entropy trains on; "icl": the teacher's responses
    soft_k: int = 1024  # soft labels keep this many likeliest tokens (all, if the vocabulary is smaller)
    icl_demos: str = "set"  # before evaluation rows: the set's N rows; "pool": N - 1 other rows drawn for each
    select: str = "dev"  # how the rate is chosen; "eval": on the evaluation rows, as in the paper
    paper_compat: bool = False  # choices of the released scripts instead of ours: docs/reference.md lists them
    seed: int = 0
    eval_rows: int = 500
    asim_rows: int = 100
    batch_size: int = 4
    epochs: int = 50
    patience: int = 5

    @property
    def settings(self) -> Settings:
        return Settings(
            self.batch_size, self.epochs, self.patience, list(self.layers) or None, keep_last=self.paper_compat
        )


@dataclass
class Lab:
    """What an experiment works with: a frozen model, its tokenizer, where results go, and how progress is shown."""

    model: nn.Module
    tokenizer: Tokenizer
    name: str  # of the model, as the table names it
    folder: RunFolder
    options: Options
    bar: Callable  # bar(label, total) -> context manager yielding a tqdm
    budget: int = 4096  # tokens in one forward pass
    side_by_side: int | None = None  # runs trained together; None: all

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def stage(self, stage: str, label: str, total: int) -> Iterator:
        with self.folder.stage(stage), self.bar(label, total) as bar:
            yield bar


def make_adapter(model: nn.Module, o: Options) -> Adapter:
    """The adapter that the options ask for. Raises UsageError for targets that the model lacks."""
    if o.adapter in ("prompt", "prefix"):
        if o.targets:
            raise UsageError(f"--targets chooses matrices, and a {o.adapter} adapter has none; leave it out")
        return ADAPTERS[o.adapter](model, tokens=o.virtual_tokens)
    arguments = {"targets": o.targets} if o.targets else {}
    if o.adapter == "lora":
        arguments |= {"rank": o.rank, "alpha": o.alpha}
    if o.adapter == "ia3":
        arguments |= {"scale_inputs": o.paper_compat}
    return ADAPTERS[o.adapter](model, **arguments)


class Cell:
    """One task at one N on one model: its sets, and everything computed on them, each thing once."""

    def __init__(self, lab: Lab, task: Task, n: int, pool: Examples, evals: dict[str, Examples]):
        self.lab, self.task, self.n, self.evals = lab, task, n, evals
        self.name, self.single, o = f"{task.name}-n{n}", bool(task.labels), lab.options
        queries = max(len(e.rows) for e in evals.values()) if o.icl_demos == "pool" or o.paper_compat else 0
        self.episodes = [
            draw_episode(pool.rows, n, number, o.seed, queries, o.paper_compat) for number in range(o.sets)
        ]
        if self.single:
            for name, examples in evals.items():
                lab.tokenizer.label_ids(
                    examples.rows[0].prompt, find(name, task).labels
                )  # merging labels: found before any work
        elif not lab.tokenizer.eos_ids:
            raise UsageError(
                f"{task.name}: its answers end with EOS, but the checkpoint's config.json names no eos_token_id; add it there"
            )
        self.adapter, depth = make_adapter(lab.model, o), lab.model.config.num_hidden_layers
        if bad := [layer for layer in o.layers if not 0 <= layer < depth]:
            raise UsageError(f"--layers {bad[0]}: this model has layers 0 to {depth - 1}")
        self.rates = o.rates or (TINY_RATES if lab.name == "tiny" else RATES)[o.adapter]
        self.betas = o.betas or BETAS[lab.model.config.model_type]
        self.references: dict[str, tuple] = {}

    @cached_property
    def job(self) -> Job:
        """All runs of the cell, after the teacher's pass over every set."""
        lab, o = self.lab, self.lab.options
        rows = sum(len(e.train) + len(e.dev) for e in self.episodes)
        with lab.stage("collect", f"{self.name}: collecting", rows) as bar:
            sets = [self.collect(episode, bar.update) for episode in self.episodes]
        return Job(
            lab.model,
            self.adapter,
            sets,
            self.rates,
            self.betas,
            o.seed,
            o.labels,
            o.settings,
            lab.side_by_side,
            self.training,
            self.fit,
        )

    def collect(self, episode: Episode, watch: Callable[[int], None]) -> SetRows:
        """A set's rows with their true answers, and with the teacher's responses and targets."""
        lab, n = self.lab, len(episode.train)
        o = lab.options
        soft_k = o.soft_k if "soft" in o.methods else None
        truth = [truth_row(example, lab.tokenizer, self.single) for example in episode.train + episode.dev]
        stop = None if o.paper_compat else STOP
        taught = teach(
            lab.model,
            lab.tokenizer,
            episode,
            self.task.max_tokens,
            soft_k,
            list(o.layers) or None,
            stop,
            lab.budget,
            watch,
        )
        return SetRows(truth[:n], truth[n:], taught[:n], taught[n:])

    def grid(self, method: str) -> list[tuple[int, float, float | None]]:
        """(set, rate, β) of each of a method's runs."""
        betas = self.betas if method == "ia2+sft" else [None]
        return list(product(range(len(self.episodes)), self.rates, betas))

    @contextmanager
    def training(self, about: tuple[str, int, int]) -> Iterator[Callable[[int, Tensor], None]]:
        """Show a phase of training: its runs still going and their best dev losses."""
        phase, runs, steps = about
        with self.lab.stage("train", f"{self.name}: training {phase}", steps) as bar:

            def watch(step: int, dev_losses: Tensor) -> None:
                bar.update(step - bar.n)
                if len(dev_losses):
                    low, high = dev_losses.min().item(), dev_losses.max().item()
                    bar.set_postfix_str(f"{len(dev_losses)} of {runs} runs going, dev loss {low:.3g} to {high:.3g}")

            yield watch

    def fit(self, method: str) -> Fit:
        """The trained runs of a method; a phase that methods share is trained once."""
        tensors = self.lab.folder.once(f"{self.name}/fit-{method}", lambda: vars(METHODS[method](self.job)))
        return Fit(**tensors | {"theta": tensors["theta"].to(self.lab.device)})

    def prompts(self, name: str, number: int | None = None) -> tuple[Callable, list[list[int]]]:
        """The model and the prompts of an evaluation, without demonstrations or with those of set `number` (computed once)."""
        lab, queries = self.lab, [e.prompt for e in self.evals[name].rows]
        if number is None:
            return lab.model, lab.tokenizer.encode_all(queries)
        return share_prefix(lab.model, lab.tokenizer, self.episodes[number].icl, queries)

    def reference(self, name: str) -> tuple[list[dict[str, Tensor]], Tensor | list[list[Row]]]:
        """What the base model does with each set's demonstrations: its scores, and the attention outputs that `asim` compares with.

        Those of the first evaluation rows: [L, sets, rows, D]; where answers have many tokens, rows that hold them, a list a set.
        """
        if name not in self.references:
            lab, o, parts, alike = self.lab, self.lab.options, [], []
            rows, itself = len(self.evals[name].rows), torch.ones(1, lab.model.config.num_hidden_layers)
            count, plain = rows if "icl" in o.methods else min(rows, o.asim_rows), self.prompts(name)[1][: o.asim_rows]
            with lab.stage("evaluate", f"{self.name}: icl on {name}", count * len(self.episodes)) as bar:
                for number in range(len(self.episodes)):
                    model, prompts = self.prompts(name, number)
                    if self.single:
                        part = self.labelled(name, model, prompts[:count], bar, keep=o.asim_rows)
                        alike.append(part.pop("outputs"))
                    else:
                        responses, correct = self.generated(name, model, prompts[:count], bar, f"icl-{number}")
                        part = {"correct": correct}
                        alike.append([Row(p, self.ended(r)) for p, r in zip(plain, responses)])
                        observe(
                            model, alike[-1], prompts[: len(plain)], single=False, device=lab.device, budget=lab.budget
                        )
                    parts.append(part | {"asim": itself})
            self.references[name] = parts, torch.cat(alike, 1) if self.single else alike
        return self.references[name]

    def score(self, method: str, name: str) -> dict[str, Tensor]:
        """What `method` makes of evaluation `name`: `asim` [R, L]; `top`, `confidence`, `labels` or, of many tokens, `correct` [R, Q]."""
        lab, sets = self.lab, len(self.episodes)
        fit = None if method in UNTRAINED else self.fit(method)

        def evaluate() -> dict[str, Tensor]:
            parts, alike = self.reference(name)
            if method == "icl":
                return joined(parts)
            model, prompts = self.prompts(name)
            thetas = [None] if fit is None else fit.theta.split(len(fit.theta) if self.single else 1)
            parts, runs = [], 1 if fit is None else len(fit.theta)
            with lab.stage("evaluate", f"{self.name}: {method} on {name}", runs * len(prompts)) as bar:
                for r, theta in enumerate(
                    thetas
                ):  # long answers: a run at a time, whose rows fill a batch and leave when finished
                    with nullcontext(model) if theta is None else adapted(model, self.adapter, theta) as student:
                        if self.single:
                            parts.append(self.labelled(name, student, prompts, bar, runs, like=alike))
                        else:
                            responses, correct = self.generated(name, student, prompts, bar, f"{method}-{r}")
                            mine = alike if theta is None else [alike[r * sets // runs]]
                            parts.append({"correct": correct, "asim": self.likeness(student, mine, responses)})
            return joined(parts)

        return lab.folder.once(f"{self.name}/{method}-on-{name}", evaluate)

    def labelled(
        self, name: str, model: Callable, prompts: list[list[int]], bar, runs: int = 1, **taps
    ) -> dict[str, Tensor]:
        """`label_scores` of `model` on evaluation `name`, and which rows are right; `taps`: its `keep` or `like`."""
        lab, examples, labels = self.lab, self.evals[name].rows, find(name, self.task).labels
        label_ids = lab.tokenizer.label_ids(examples[0].prompt, labels)
        among = 10 if lab.options.paper_compat else None

        def watch(queries: int) -> None:
            bar.update(queries * runs)

        scores = vars(
            label_scores(
                model, prompts, label_ids, runs, among, device=lab.device, budget=lab.budget, watch=watch, **taps
            )
        )
        correct = scores["top"] == torch.tensor([label_ids[e.label] for e in examples[: len(prompts)]])
        return {key: value for key, value in scores.items() if value is not None} | {"correct": correct}

    def generated(
        self, name: str, model: Callable, prompts: list[list[int]], bar, tag: str
    ) -> tuple[list[list[int]], Tensor]:
        """Greedy responses of `model` on evaluation `name`, and which are right, [1, Q]; kept in the folder under `tag`."""
        lab, task, answers = self.lab, find(name, self.task), [e.answer for e in self.evals[name].rows[: len(prompts)]]

        def make() -> dict:
            ids = generate(model, lab.tokenizer, prompts, task.max_tokens, budget=4 * lab.budget, watch=bar.update)
            texts = [lab.tokenizer.decode(response) for response in ids]
            return {"texts": texts, "answers": answers, "parser": task.parse.__name__, "ids": ids}

        kept = lab.folder.json_once(f"{self.name}/generations/{tag}-on-{name}.json", make)
        return kept["ids"], parsed_correct(task.parse, kept["texts"], answers)[None]

    def likeness(self, model: Callable, like: list[list[Row]], responses: list[list[int]]) -> Tensor:
        """asim of one model to several lists of rows, [lists, L]; as the released scripts take it, on the model's own `responses`."""
        if self.lab.options.paper_compat:
            like = [[cut(row, self.ended(response)) for row, response in zip(rows, responses)] for rows in like]
        return torch.stack([layer_asim(model, rows, self.lab.device, self.lab.budget) for rows in like])

    def ended(self, response: list[int]) -> list[int]:
        """A generated response with the end-of-sequence token, unless it was cut."""
        return (response + list(self.lab.tokenizer.eos_ids[:1]))[: self.task.max_tokens]


def cut(row: Row, response: list[int]) -> Row:
    """The row with another response in place of its own, both cut to the shorter: what the released scripts compare."""
    response = response[: len(row.answer)]
    return Row(row.prompt, response, row.activations[:, : len(response)])


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The scores of several runs as one."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def find(name: str, task: Task) -> Task:
    """The task called `name`; `task` itself needs no entry in the catalog."""
    return task if name == task.name else find_task(name)


def parsed_correct(parse: Callable, texts: list[str], answers: list[str]) -> Tensor:
    """Whether each generated text parses to the same answer as the true one: [Q] bool."""
    return torch.tensor(
        [(found := parse(text)) is not None and found == parse(answer) for text, answer in zip(texts, answers)]
    )
