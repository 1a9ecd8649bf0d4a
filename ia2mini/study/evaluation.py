"""An evaluation, and the reference that scores are compared with.

R runs, Q evaluation rows, C labels, L layers, n rows on which attention outputs are compared, D hidden.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..batch import TokenRow
from ..engine.experiment import Experiment
from ..engine.options import Options
from ..tasks import Example, Task
from ..tokenizer import Tokenizer
from ..train import Trained
from .cells import Cell

# asim [R, L], correct [R, Q]; of labels top, confidence [R, Q] and log_probabilities [R, Q, C]
Scores = dict[str, Tensor]


@dataclass
class Reference:
    """The base with one set's demonstrations (ICL): the reference of all methods on that set."""

    number: int  # of the set
    scores: Scores = field(default_factory=dict)
    outputs: Tensor | None = None  # of labels: attention outputs [L, 1, n, D]
    # of texts: the first n responses with their attention outputs
    rows: list[TokenRow] = field(default_factory=list)


@dataclass
class Evaluation:
    """One evaluation of a cell: its rows, and the trained runs that are scored on them."""

    cell: Cell
    experiment: Experiment
    name: str
    task: Task
    rows: list[Example]
    labels: list[list[int]] | None  # tokens of each label; None of texts
    trained: dict[str, Trained]
    scored_runs: dict[str, list[int]]  # of each method

    @property
    def model(self) -> nn.Module:
        return self.experiment.subject.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.experiment.subject.tokenizer

    @property
    def options(self) -> Options:
        return self.cell.study.options

    @property
    def prompts(self) -> list[list[int]]:
        return self.tokenizer.encode_all([row.prompt for row in self.rows])

    def phase(self, method: str, count: int):
        return self.experiment.phase("evaluate", f"{method} on {self.name}", count)
