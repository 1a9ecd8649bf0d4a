"""Rivals that embed a text: SetFit, and logistic regression on a sentence embedding that stays as it is.

Both are taken as their authors give them: every setting is the default, the head is scikit-learn's logistic regression.
"""

import io
import logging
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ia2mini import UsageError

from ..timing import clock
from .measured import MB, Measured, folder_mb, measure

NEEDED = {
    "setfit": ("setfit", "sentence-transformers", "datasets", "scikit-learn"),
    "embedding": ("sentence-transformers", "scikit-learn"),
}
LEAST = 1e-30  # probability: a zero has no logarithm


def check_embedder(parts: tuple[str, ...], folder: Path | None) -> dict[str, str]:
    """The versions of what these rivals need. Raises UsageError where a package or the embedder's folder is missing."""
    found = {}
    for part in parts:
        for package in NEEDED.get(part, ()):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                mend = "pip install 'ia2mini[rivals]', or leave it out with --parts"
                raise UsageError(f"{part}: the package {package} is missing; {mend}") from None
    if found and (folder is None or not (folder / "modules.json").is_file()):
        given = "not given" if folder is None else f"{folder} has no modules.json"
        raise UsageError(
            f"--embedder: {given}; name the folder of a sentence-transformers model, as all-MiniLM-L6-v2"
        )
    return found


def texts(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def numbers(rows: list[dict]) -> tuple[list[str], list[int]]:
    """The labels in sorted order, and each row's place among them."""
    labels = sorted({row["label"] for row in rows})
    return labels, [labels.index(row["label"]) for row in rows]


def log_probabilities(shares) -> list[list[float]]:
    return np.log(np.maximum(np.asarray(shares, dtype=np.float64), LEAST)).tolist()


@contextmanager
def quiet():
    """Bars and settings that training prints would stand between our own lines."""
    logging.getLogger("setfit").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def setfit(folder: Path, rows: list[dict], fresh: list[dict], seed: int) -> Measured:
    """SetFit (Tunstall et al. 2022, arXiv 2209.11055): the embedder is trained on pairs of rows, then the head."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    labels, answers = numbers(rows)
    with quiet(), TemporaryDirectory() as out:
        model = SetFitModel.from_pretrained(str(folder), device="cpu")
        how = TrainingArguments(
            output_dir=out,
            seed=seed,
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        )
        known = Dataset.from_dict({"text": texts(rows), "label": answers})
        trainer = Trainer(model=model, args=how, train_dataset=known)
        seconds = clock(trainer.train)
        model.save_pretrained(f"{out}/model")
        shipped = folder_mb(Path(out, "model"))

        def answer(some: list[dict]) -> list[list[float]]:
            shares = model.predict_proba(texts(some), show_progress_bar=False, as_numpy=True)
            return log_probabilities(shares)

        assert list(model.model_head.classes_) == list(range(len(labels)))
        said = {
            "epochs": how.embedding_num_epochs,
            "batch": how.embedding_batch_size,
            "sampling": how.sampling_strategy,
            "learning rate of the embedder": f"{how.body_embedding_learning_rate:g}",
            "head": type(model.model_head).__name__,
        }
        note = ", ".join(f"{name} {value}" for name, value in said.items())
        return measure(answer, fresh, seconds, (shipped, 0.0), note)


def open_embedder(folder: Path):
    """What embeds texts: `encode(list of n texts)` gives an array [n, D]."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def embedding(folder: Path, rows: list[dict], fresh: list[dict], seed: int) -> Measured:
    """Logistic regression on the embeddings; nothing is drawn, so that `seed` changes nothing."""
    from sklearn.linear_model import LogisticRegression

    labels, answers = numbers(rows)
    with quiet():
        embedder = open_embedder(folder)
        head = LogisticRegression(max_iter=1000)

        def answer(some: list[dict]) -> list[list[float]]:
            return log_probabilities(head.predict_proba(embedder.encode(texts(some))))

        seconds = clock(lambda: head.fit(embedder.encode(texts(rows)), answers))
        assert list(head.classes_) == list(range(len(labels)))
        shipped = (head.coef_.nbytes + head.intercept_.nbytes) / MB
        note = f"head LogisticRegression, C {head.C:g}"
        return measure(answer, fresh, seconds, (shipped, folder_mb(folder)), note)


EMBEDDED = {"setfit": setfit, "embedding": embedding}
