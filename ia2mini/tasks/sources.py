"""Load the rows of a task from the hub, a local folder, the embedded world or a user's file, as `Examples`."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath

from ia2mini import UsageError
from ia2mini.files import plain
from ia2mini.files.hub import hub_errors, patiently

from . import world
from .catalog import Example, Task, arrange
from .columns import Columns
from .own import complete_rows, own_task
from .rows import SUFFIXES, Row, fill, read_rows

POOL = 2000  # largest pool
EVAL = 500  # largest evaluation
PARQUET = "refs/convert/parquet"  # the branch of the hub's own Parquet conversion


@dataclass(frozen=True)
class Examples:
    """Rows of a task and their `origin`: files, or hub id and revision; counts of rows; sha256 of the rows as text."""

    rows: list[Example]
    origin: dict


def load_examples(
    task: Task, role: str, data_dir: str | Path | None = None, limit: int | None = None
) -> Examples:
    """The pool (role "train", at most 2,000 rows) or the evaluation (role "eval", at most 500, or `limit`) of a task.

    Rows come from the local folder `data_dir` where given, else from the hub; embedded tasks and own files ignore it.
    Which rows count, and in which order: protocol section 1. UsageError for anything a user can mend.
    """
    assert role in ("train", "eval")
    if role == "train" and task.train is None:
        mend = "choose a task that `ia2mini tasks` lists with a pool"
        raise UsageError(f"{task.name} is only evaluated on, it has no training rows; {mend}")
    rows, origin = fetch(task, role, data_dir)
    chosen = arrange(task, role, rows)
    most = POOL if role == "train" else EVAL
    examples = [task.example(row) for row in chosen[:most][:limit]]
    if not examples:
        left = f"no rows left to {role} on, of {len(rows)} in {origin['files'][0]}"
        raise UsageError(f"{task.name}: {left}; more rows are needed")
    text = json.dumps([(example.prompt, example.answer) for example in examples])
    digest = hashlib.sha256(text.encode()).hexdigest()
    counts = {"rows": len(rows), "kept": len(chosen), "used": len(examples)}
    return Examples(examples, {**origin, **counts, "digest": digest})


def fetch(task: Task, role: str, data_dir: str | Path | None) -> tuple[list[Row], dict]:
    """All rows of the split for a role, in the source's order, and their origin."""
    split = task.train if role == "train" else task.eval
    if task.hub is None and not task.files:
        numbered = enumerate(world.rows(task.name, role), 1)
        rows = [Row(f"{task.name} {role} row {i}", row) for i, row in numbered]
        return rows, {"source": "embedded", "files": [task.name]}
    if task.files:
        train, evaluation = task.files
        path = Path(train if role == "train" else evaluation)
        return read_rows(path), {"source": "own rows", "files": [str(path)]}
    if data_dir is not None:
        path = find_local(task, split, Path(data_dir))
        origin = {"source": "folder", "files": [str(path)]}
        return read_rows(path, named_classes=False), origin
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
    spellings = [task.folder, short.lower().replace("-", "_"), short, task.name]
    folders = list(dict.fromkeys(filter(None, spellings)))
    stems = [split]
    if task.config:
        stems += [f"{task.config}_{split}", f"{task.config}/{split}"]
    for folder, stem, suffix in product(folders, stems, SUFFIXES):
        path = data_dir / folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    searched = f"{'|'.join(folders)} / {'|'.join(stems)} + {'|'.join(SUFFIXES)}"
    raise UsageError(f"{data_dir}: no rows of {task.name} there; looked for {searched}")


def download(
    repo: str, choose: Callable[[list[str]], list[str]], revision=None
) -> tuple[list[Path], dict]:
    """Files of a dataset repository that `choose` picks from all names (offline: the cached) -> (paths, origin)."""
    from huggingface_hub import HfApi, errors, snapshot_download

    get = partial(snapshot_download, repo, repo_type="dataset", revision=revision)
    note = ""
    with hub_errors(repo, "dataset", revision, "give local rows with --data-dir"):
        try:
            info = patiently(lambda: HfApi().dataset_info(repo, revision=revision, timeout=10))
            names = [file.rfilename for file in info.siblings]
        except Exception as error:
            try:
                cached = Path(get(allow_patterns=[], local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise error from None
            files = [path for path in cached.rglob("*") if path.is_file()]
            names = [path.relative_to(cached).as_posix() for path in files]
            note = "; the hub cannot be reached, so this is what the local cache holds"
        try:
            chosen = choose(sorted(names))
        except UsageError as error:
            raise UsageError(f"{error}{note}") from None
        wanted = [f"{PurePosixPath(name).parent}/*" for name in chosen]
        folder = Path(patiently(lambda: get(allow_patterns=wanted)))
    origin = {"source": "hub", "hub": repo, "revision": folder.name, "files": chosen}
    return [folder / name for name in chosen], origin


def read_hub(repo: str, config: str | None, splits: tuple[str, ...]) -> tuple[list[Row], dict]:
    """Rows of splits, one after another, from the Parquet branch of a dataset on the hub."""

    def choose(names: list[str]) -> list[str]:
        files = [PurePosixPath(name) for name in names if name.endswith(".parquet")]
        files = [file for file in files if len(file.parts) == 3]  # config/split/number.parquet
        configs = {file.parts[0] for file in files}
        only = configs if len(configs) == 1 else ()
        wanted = next((name for name in (config, "default", *only) if name in configs), None)
        chosen = []
        for split in splits:
            of_split = [str(file) for file in files if file.parts[:2] == (wanted, split)]
            if not of_split:
                folder = f"{config or 'default'}/{'+'.join(splits)} in branch {PARQUET}"
                found = ", ".join(sorted({str(file.parent) for file in files})) or "nothing"
                raise UsageError(f"{repo}: no Parquet folder {folder}; found {found}")
            chosen += of_split
        return chosen

    paths, origin = download(repo, choose, PARQUET)
    return [row for path in paths for row in read_rows(path, named_classes=False)], origin


def read_archive(repo: str, name: str, sha256: str, member: str) -> tuple[list[Row], dict]:
    """Rows of latin-1 lines `sentence@label` in a file in a zip on the hub, as Financial PhraseBank was published."""
    (path,), origin = download(repo, lambda names: [name])
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        other = f"missing, or not the published file of sha256 {sha256}"
        raise UsageError(f"{path}: {other}; delete it and try again")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside = next(entry for entry in archive.namelist() if PurePosixPath(entry).name == member)
        lines = archive.read(inside).decode("latin-1").split("\n")
    places = {"negative": 0, "neutral": 1, "positive": 2}
    rows = []
    for number, line in enumerate(filter(str.strip, lines), 1):
        sentence, _, label = line.rstrip("\r").rpartition("@")
        rows.append(Row(f"{name}:{number}", {"sentence": sentence, "label": places[label]}))
    return rows, origin


def custom_task(
    path: str | Path, prompt=None, answer=None, template: str | None = None, eval_path=None
) -> Task:
    """The task (`own_task`) of a user's file: `load_examples` works on it as on any other. Its name is the file's.

    Without `eval_path`, the last 20 % (at least 20, at most half and 500) of the shuffled rows without repeated prompts
    are held out. UsageError for whatever is wrong with the rows or the template.
    """
    file = Path(path)
    rows = read_rows(file)
    complete, task = own_task(rows, str(path), Columns(prompt, answer, template))
    remarks = task.remarks
    if eval_path:
        others, left_out = complete_rows(
            read_rows(Path(eval_path)), task.prompt, task.answer_column
        )
        remarks = (*remarks, *left_out, *repeated_prompts(task, complete, others))
    prompts = len({fill(task.prompt, row) for row in complete})
    held_out = min(max(prompts // 5, 20), prompts // 2, EVAL)
    steps = ("complete", "unique", "shuffle", "filter", "split")
    return replace(
        task,
        name=plain(file.stem, ""),
        tag=plain(file.name, ""),
        remarks=remarks,
        steps=steps[:-1] if eval_path else steps,
        held_out=held_out,
        files=(str(path), str(eval_path or path)),
    )


def repeated_prompts(task: Task, rows: list[Row], others: list[Row]) -> list[str]:
    """A sentence where evaluation rows have prompts of the rows that are trained on."""
    known = {fill(task.prompt, row) for row in rows}
    again = sum(fill(task.prompt, row) in known for row in others)
    if not again:
        return []
    fitted = "a prompt of the rows to train on: accuracy on new rows may be lower"
    return [f"{again} of {len(others)} evaluation rows have {fitted}"]
