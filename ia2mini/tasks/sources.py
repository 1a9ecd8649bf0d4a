"""Where rows come from: the hub, a local folder in hub columns, the embedded world, or a user's own file; as `Examples`."""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath

from ia2mini import UsageError
from ia2mini.files import hub_errors

from .answers import PARSERS
from .catalog import Example, Task, arrange
from .rows import READERS, Row, fill, placeholders, read_rows

POOL, EVAL = 2000, 500  # most rows of a pool and of an evaluation
PARQUET = "refs/convert/parquet"  # the branch of the hub's own Parquet conversion


@dataclass(frozen=True)
class Examples:
    """Rows of a task and their `origin`: files, or hub id and revision; counts of rows; sha256 of the prompts and answers."""

    rows: list[Example]
    origin: dict


def load_examples(task: Task, role: str, data_dir: str | Path | None = None, limit: int | None = None) -> Examples:
    """The pool (role "train", at most 2,000 rows) or the evaluation (role "eval", at most 500, or `limit`) of a task.

    Rows come from the local folder `data_dir` where given, else from the hub; embedded tasks and own files ignore it. Which rows count,
    and in which order: protocol section 1. UsageError for anything a user can mend.
    """
    assert role in ("train", "eval")
    if role == "train" and task.train is None:
        raise UsageError(
            f"{task.name} is only evaluated on, it has no training rows; choose a task that `ia2mini tasks` lists with a pool"
        )
    rows, origin = fetch(task, role, data_dir)
    chosen = arrange(task, role, rows)
    examples = [task.example(row) for row in chosen[: POOL if role == "train" else EVAL][:limit]]
    if not examples:
        raise UsageError(
            f"{task.name}: no rows left to {role} on, of {len(rows)} in {origin['files'][0]}; more rows are needed"
        )
    digest = hashlib.sha256(json.dumps([(example.prompt, example.answer) for example in examples]).encode()).hexdigest()
    return Examples(
        examples, {**origin, "rows": len(rows), "kept": len(chosen), "used": len(examples), "digest": digest}
    )


def fetch(task: Task, role: str, data_dir: str | Path | None) -> tuple[list[Row], dict]:
    """All rows of the split that a role is taken from, in the source's order, and where they are from."""
    split = task.train if role == "train" else task.eval
    if task.hub is None and not task.files:
        from .world import rows

        origin = {"source": "embedded", "files": [task.name]}
        return [Row(f"{task.name} {role} row {i}", row) for i, row in enumerate(rows(task.name, role), 1)], origin
    if task.files or data_dir is not None:
        path = Path(task.files[role == "eval"]) if task.files else find_local(task, split, Path(data_dir))
        return read_rows(path), {"source": "own rows" if task.files else "folder", "files": [str(path)]}
    if task.archive:
        return read_archive(task.hub, *task.archive)
    try:
        return read_hub(task.hub, task.config, (split,))
    except UsageError as error:
        if not task.fallback:
            raise
        rows, origin = read_hub(task.fallback[0], None, task.fallback[1:])
        return rows, {**origin, "instead_of": task.hub, "because": str(error)}


def find_local(task: Task, split: str, data_dir: Path) -> Path:
    """The file of a split in a folder of hub-like data, `{dataset}/{split}.jsonl` and its other spellings."""
    short = task.hub.split("/")[1]
    folders = list(
        dict.fromkeys(name for name in (task.folder, short.lower().replace("-", "_"), short, task.name) if name)
    )
    stems = [split, *([f"{task.config}_{split}", f"{task.config}/{split}"] if task.config else [])]
    for folder, stem, suffix in product(folders, stems, READERS):
        path = data_dir / folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    looked = f"{'|'.join(folders)} / {'|'.join(stems)} + {'|'.join(READERS)}"
    raise UsageError(f"{data_dir}: no rows of {task.name} there; looked for {looked}")


def download(repo: str, choose, revision: str | None = None) -> tuple[list[Path], str]:
    """Files of a dataset repository, those that `choose` picks from the list of all names -> (local paths, commit).

    Where the hub cannot be reached the list is that of the cached snapshot. UsageError for whatever keeps the files from coming.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    get, note = partial(snapshot_download, repo, repo_type="dataset", revision=revision), ""
    with hub_errors(repo, "dataset", revision, "give local rows with --data-dir"):
        try:
            names = [file.rfilename for file in HfApi().dataset_info(repo, revision=revision, timeout=10).siblings]
        except Exception as error:
            try:
                cached = Path(get(allow_patterns=[], local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise error from None
            names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
            note = "; the hub cannot be reached, so this is what the local cache holds"
        try:
            chosen = choose(sorted(names))
        except UsageError as error:
            raise UsageError(f"{error}{note}") from None
        folder = Path(get(allow_patterns=[f"{PurePosixPath(name).parent}/*" for name in chosen]))
    return [folder / name for name in chosen], folder.name


def read_hub(repo: str, config: str | None, splits: tuple[str, ...]) -> tuple[list[Row], dict]:
    """Rows of splits, one after another, from the Parquet branch of a dataset on the hub."""

    def choose(names: list[str]) -> list[str]:
        found = [match for match in map(re.compile(r"([^/]+)/([^/]+)/[^/]+\.parquet").fullmatch, names) if match]
        configs = {match[1] for match in found}
        wanted = next(
            (name for name in (config, "default", *(configs if len(configs) == 1 else ())) if name in configs), None
        )
        chosen = [[match[0] for match in found if match[1] == wanted and match[2] == split] for split in splits]
        if not all(chosen):
            there = ", ".join(sorted({f"{match[1]}/{match[2]}" for match in found})) or "nothing"
            raise UsageError(
                f"{repo}: no Parquet folder {config or 'default'}/{'+'.join(splits)} in branch {PARQUET}; found {there}"
            )
        return sum(chosen, [])

    paths, commit = download(repo, choose, PARQUET)
    rows = [row for path in paths for row in read_rows(path)]
    return rows, {
        "source": "hub",
        "hub": repo,
        "revision": commit,
        "files": ["/".join(path.parts[-3:]) for path in paths],
    }


def read_archive(repo: str, name: str, sha256: str, member: str) -> tuple[list[Row], dict]:
    """Rows of a latin-1 text file of lines `sentence@label` inside a zip on the hub, as Financial PhraseBank was published."""
    (path,), commit = download(repo, lambda names: [name])
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{path}: missing, or not the published file of sha256 {sha256}; delete it and try again")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside = next(entry for entry in archive.namelist() if PurePosixPath(entry).name == member)
        lines = archive.read(inside).decode("latin-1").split("\n")
    labels = {"negative": 0, "neutral": 1, "positive": 2}
    pairs = [line.rstrip("\r").rpartition("@") for line in lines if line.strip()]
    rows = [
        Row(f"{name}:{i}", {"sentence": sentence, "label": labels[label]})
        for i, (sentence, _, label) in enumerate(pairs, 1)
    ]
    return rows, {"source": "hub", "hub": repo, "revision": commit, "files": [name]}


def custom_task(
    path: str | Path,
    prompt_column: str,
    answer_column: str,
    template: str | None = None,
    eval_path: str | Path | None = None,
) -> Task:
    """A task on a user's file: `load_examples` works on it as on any other. Its name is the file's.

    At most 20 different answers, each given twice on average, are labels: `task.labels`, sorted. Other answers are text,
    parsed as numbers, boxes or after `####` where every answer has that form. Without `eval_path`, the last 20 % (at
    least 20, at most half and 500) of the shuffled rows without repeated prompts are held out. In a template, a written
    `\\n` is a line end. UsageError for whatever is wrong with the rows or the template.
    """
    rows = read_rows(Path(path))
    answers = [row.text(answer_column) for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        if not answer.strip():
            raise UsageError(f"{row.where}: column {answer_column!r} is empty")
    found = sorted(set(answers))
    labelled = len(found) <= 20 and 2 * len(found) <= len(rows)
    if len(found) == 1:
        raise UsageError(f"{path}: every row has the answer {found[0]!r}; nothing can be learned from it")
    default = f"Text:{{{prompt_column}}}\nLabel:" if labelled else f"Question:{{{prompt_column}}}\nAnswer:"
    template = template.replace("\\n", "\n") if template else default
    columns = placeholders(template)
    if not columns or answer_column in columns:
        named = f"must name a column of the prompt, as {{{prompt_column}}}, and not the answer's"
        raise UsageError(f"template {template!r}: {named}")
    prompts = len({fill(template, row) for row in rows})
    parser = next(name for name, parse in PARSERS.items() if all(map(parse, answers)))
    labels = {"labels": tuple(found), "known": {answer: i for i, answer in enumerate(found)}}
    form = labels if labelled else {"max_tokens": 200, "parser": parser}
    return Task(
        Path(path).stem,
        Path(path).name,
        train="train",
        eval="eval",
        prompt=template,
        label=answer_column,
        answer=f"{{{answer_column}}}",
        steps=("unique", "shuffle", "filter", *(() if eval_path else ("split",))),
        held=min(max(prompts // 5, 20), prompts // 2, EVAL),
        files=(str(path), str(eval_path or path)),
        **form,
    )
