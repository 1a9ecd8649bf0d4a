"""One task at one N on one model: what its trained sets, the base and ICL make of the evaluation rows, kept on disk."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .adapters import IA3, Adapter, LoRA, adapted
from .batch import Row
from .evaluate import Scoring, label_scores, layer_asim, share_prefix, spellings
from .generate import Decoding, generate
from .metrics import fit_temperature
from .options import UNTRAINED
from .peft_format import Merged
from .sets import FewShotSets
from .tasks import Example, same_answer
from .teacher import Asked, label_tokens_at_most, observe


class Experiment(FewShotSets):
    """One task at one N with one adapter: scored, each method once."""

    def variants(self) -> Iterator["Experiment"]:
        """The experiment with each adapter that is compared: the first scores also what has none."""
        yield self
        for kind in self.setting.options.adapters[1:]:
            other = copy.copy(self)
            other.take(kind)
            yield other

    def prompts(self, rows: list[Example], number: int | None = None) -> tuple[Callable, list[list[int]]]:
        """The model and the prompts of rows, without demonstrations or with those of set `number`."""
        subject, queries = self.setting.subject, [e.prompt for e in rows]
        if number is None:
            return subject.model, subject.tokenizer.encode_all(queries)
        return share_prefix(subject.model, subject.tokenizer, self.episodes[number].icl, queries)

    def reference(self, name: str) -> tuple[dict[str, Tensor], Any]:
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
                    parts.append(part)
            scores = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            scores["asim"] = torch.ones(len(parts), self.setting.subject.model.config.num_hidden_layers)
            self.references[name] = scores, torch.cat(alike, 1) if self.labelled else alike
        return self.references[name]

    def score(self, method: str, name: str) -> dict[str, Tensor]:
        """What `method`'s reported runs make of evaluation `name`: `asim` [R, L], `correct` [R, Q], labels' scores."""
        return self.setting.folder.once(f"{self.place(method)}/{method}-on-{name}", lambda: self.evaluate(method, name))

    def evaluate(self, method: str, name: str) -> dict[str, Tensor]:
        icl, alike = self.reference(name)
        if method == "icl":
            return icl
        (model, prompts), runs = self.prompts(self.evals[name].rows), [0]
        under = nullcontext(model)
        if method not in UNTRAINED:
            runs = self.reported(method)
            under = adapted(model, self.scored, self.trained(method).theta[runs])
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
            under = nullcontext(model) if theta is None else adapted(model, self.scored, theta[[place]])
            with under as student:
                how = Scoring(ends=self.setting.subject.tokenizer.eos_ids)
                scores = label_scores(student, prompts, self.labels[self.task.name], how)
            found.append(fit_temperature(scores.log_probabilities[0], torch.tensor([e.label for e in dev])))
        return found

    def score_labels(self, name: str, model: Callable, prompts: list[list[int]], bar, how: Scoring) -> dict:
        """`label_scores` of `model` on evaluation `name`, and which rows are right."""
        o, examples = self.setting.options, self.evals[name].rows
        how = replace(how, budget=self.setting.budget, ends=self.setting.subject.tokenizer.eos_ids)
        if o.paper_compat:
            how = replace(how, among=10, spelled=self.spellings(name))
        scores = label_scores(model, prompts, self.labels[name], how, lambda queries: bar.update(queries * how.runs))
        correct = scores.top == torch.tensor([e.label for e in examples[: len(prompts)]])
        return {key: value for key, value in vars(scores).items() if value is not None} | {"correct": correct}

    @property
    def scored(self) -> Adapter:
        """The adapter as it is scored: the released scripts merge it into bfloat16 weights."""
        merge = self.setting.options.paper_compat and isinstance(self.adapter, (LoRA, IA3))
        return Merged(self.adapter) if merge else self.adapter

    def spellings(self, name: str) -> Tensor | None:
        """Which tokens count as which label of evaluation `name`; None where a label has several tokens."""
        if label_tokens_at_most(self.labels[name]) > 1:
            return None
        subject = self.setting.subject
        return spellings(subject.tokenizer, self.find(name).labels, subject.model.config.vocab_size)

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
        return f"{self.place(tag.partition('-')[0])}/generations/{tag}-on-{name}.json"

    def likeness(self, model: Callable, like: list[list[Row]], responses: list[list[list[int]]]) -> Tensor:
        """asim of R runs to a list of rows each, [R, L]; as in the released scripts on the runs' own `responses`."""
        compat = self.setting.options.paper_compat
        if compat:
            own = responses * (len(like) // len(responses))
            like = [[cut(row, self.ended(r)) for row, r in zip(rows, texts)] for rows, texts in zip(like, own)]
        return layer_asim(model, like, self.setting.budget, by_row=compat)

    def ended(self, response: list[int]) -> list[int]:
        """A generated response with the end-of-sequence token, unless it was cut."""
        return (response + self.setting.subject.tokenizer.closing)[: self.max_tokens]


def cut(row: Row, response: list[int]) -> Row:
    """The row with another response in place of its own, both cut to the shorter: what the released scripts compare."""
    response = response[: len(row.answer)]
    return Row(row.prompt, response, row.activations[:, : len(response)])


def parsed_correct(kept: dict) -> Tensor:
    """Whether each of the kept texts parses to the same as its true answer, [Q] bool."""
    return torch.tensor([same_answer(kept["parser"], t, a) for t, a in zip(kept["texts"], kept["answers"])])
