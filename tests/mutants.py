"""Do the tests bite? Chosen lines are broken one at a time, in a copy of the tree: the tests beside must fail.

make mutants                              # all, some minutes; exit 1 where fewer than 95 % are caught
python tests/mutants.py losses temper     # those whose file or line holds one of these words
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT, SECONDS, ENOUGH = Path(__file__).parents[1], 300, 0.95
TREE = ("ia2mini", "models", "bench", "tests")  # what is copied
# File -> what occurs there exactly once, what is put in its place, and the test that should notice: its file and a part
# of its name. None is a crash, each is a mistake that one could make.
MUTANTS = {
    "models/layers.py": [
        ("add_(eps).rsqrt_()", "rsqrt_().add_(eps)", "models equals_transformers_in_float32"),
        ("(inverse**3 / -D", "(inverse**2 / -D", "adapters logits_gradients"),
        ("cat((-sin, sin), -1)", "cat((sin, -sin), -1)", "models equals_transformers_in_float32"),
        ("(2 * math.pi)", "math.pi", "models scaling_far_beyond"),
    ],
    "models/taps.py": [
        (
            "in self.layers or self.outputs",
            "in sorted(self.outputs)",
            "models taps_pick_positions",
        ),
    ],
    "models/attention.py": [
        ("return self.prefix.length +", "return self.prefix.length - 1 +", "cache prefix_equals"),
        ("* E**-0.5\n    scores", "\n    scores", "attention written_out_attention_and"),
        (
            "zeros.masked_fill(~mask",
            "zeros.masked_fill(mask",
            "attention written_out_attention_and",
        ),
        (
            "self.sees[asking, asked]",
            "self.sees[asked, asking]",
            "cache branches",
        ),
        ("return seen.tril()", "return seen", "cache packed_documents"),
        ("<= self.slots[..., None]", "< self.slots[..., None]", "cache unequal_prompts"),
        (
            "* E**-0.5\n    before",
            "/ E\n    before",
            "cache prefix_equals",
        ),
    ],
    "models/qwen3.py": [
        ("k = self.k_norm(", "k = self.q_norm(", "models equals_transformers_in_float32"),
    ],
    "models/checkpoint.py": [
        ("re.fullmatch(", "re.match(", "checkpoint a_shard_elsewhere"),
    ],
    "ia2mini/losses.py": [
        ("partial(student, cache=batch.packed)", "student", "own_loss share_a_line"),
        ("weighted.sum(1)", "weighted.mean(1)", "losses a_run_averages"),
        ("(2 / D)", "(1 / D)", "losses gradients_of_the_squared"),
        ("teacher.float().log_softmax(-1), ids", "teacher.float(), ids", "losses equal_naive"),
        (
            "scatter_add_(1, i, -share)",
            "scatter_add_(1, i, share - 1)",
            "losses through_the_head",
        ),
    ],
    "ia2mini/batch.py": [
        (
            "row.weight / (len(row.answer) * len(rows))",
            "1 / sum(len(r.answer) for r in rows)",
            "batch a_batch_written_out",
        ),
        ("last = len(row.prompt) - 1", "last = len(row.prompt)", "batch every_position"),
    ],
    "ia2mini/train.py": [
        (".sqrt_().add_(EPSILON)", ".add_(EPSILON).sqrt_()", "train adam_equals"),
        ("(losses < self.dev_loss)", "(losses <= self.dev_loss)", "train patience_counts"),
        (
            "(self.misses < settings.patience)",
            "(self.misses <= settings.patience)",
            "train patience_counts",
        ),
        ("self.misses[better] = 0", "pass", "train patience_counts"),
    ],
    "ia2mini/scale/parts.py": [
        (
            "runs.dev[r] for r in chosen",
            "runs.dev[r] for r in range(len(chosen))",
            "train stop_at_different_steps",
        ),
    ],
    "ia2mini/scale/pack.py": [
        ("len(rows) / len(runs[r])", "1.0", "batch a_long_row_among"),
    ],
    "ia2mini/scale/shrink.py": [
        (
            "live = live[part.going]",
            "live = live[: part.going.sum()]",
            "train stop_at_different_steps",
        ),
    ],
    "ia2mini/scale/race.py": [
        ("self.means[-1 - PACE]", "self.means[-PACE]", "train a_rate_far_behind"),
    ],
    "ia2mini/methods.py": [
        ('f"epoch {epoch}"', '"epoch"', "methods sets_start_differently"),
        (
            'seeded(self.seed, number, "adapter")',
            'seeded(self.seed, 0, "adapter")',
            "methods sets_start_differently",
        ),
        ('"mse": 1 - betas, "ce": betas', '"mse": betas, "ce": 1 - betas', "methods every_method"),
    ],
    "ia2mini/adapters.py": [
        (
            "self.scale = alpha / rank",
            "self.scale = alpha / rank**0.5",
            "adapters logits_gradients",
        ),
        ("math.sqrt(weight.shape[-1])", "math.sqrt(weight.shape[-2])", "adapters lora_starts"),
        (
            "linear.bias.float() * s",
            "linear.bias.float()",
            "peft_format a_merged_checkpoint_equals",
        ),
    ],
    "ia2mini/engine/peft.py": [
        (
            'config["lora_alpha"] = adapter.alpha',
            'config["lora_alpha"] = adapter.rank',
            "peft_format peft_loads",
        ),
        (
            'get("use_rslora") else len(A)',
            'get("use_rslora") else rank',
            "peft_reading with_equal_logits",
        ),
    ],
    "ia2mini/episode.py": [
        ("crc32(purpose.encode())]", "0]", "episode the_same_command"),
        (
            "shuffled(all_but(train, [i]), rng)",
            "shuffled(train, rng)[1:]",
            "episode are_the_other",
        ),
    ],
    "ia2mini/fitting/crossval.py": [
        ("all_but(rows, part)", "rows", "folds rows_of_a_group"),
    ],
    "ia2mini/labels.py": [
        (
            "before = agreed[..., :-1]",
            "before = agreed[..., 1:]",
            "labels several_tokens_equal",
        ),
        (
            "masked_fill(~self.is_token, 0.0)",
            "masked_fill(self.is_token, 0.0)",
            "labels several_tokens_equal",
        ),
        (
            "torch.where(self.is_end, self.any_end(logits), chosen)",
            "chosen",
            "ends a_label_ends_with_any",
        ),
    ],
    "ia2mini/prefix.py": [
        ("[prompt[:-1] for prompt in prompts]", "prompts", "evaluate one_query"),
    ],
    "ia2mini/fitting/answers.py": [
        (
            "-torch.stack(log_probabilities).logsumexp(0)",
            "-log_probabilities[0]",
            "ends the_confidence_of_a_text",
        ),
    ],
    "ia2mini/metrics.py": [
        ('confidence, side="left")', 'confidence, side="right")', "metrics bins_are_closed"),
        ("squares.sum(1)", "squares.mean(1)", "metrics accuracy_nll_brier"),
        ("default_rng(seed)", "default_rng()", "metrics ece_null_equals"),
        ("0.0 if oracle else 1 / (n + 2)", "0.0", "fit the_temperature_is"),
    ],
    "ia2mini/engine/intervals.py": [
        (
            "student_quantile(0.975, n",
            "student_quantile(0.95, n",
            "metrics paired_test_equals_scipy",
        ),
        ("n < LEAST_ROWS or", "n < 2 or", "metrics of_few_pairs"),
        ("or not np.isfinite([a, b]).all()", "", "intervals of_nothing"),
    ],
    "ia2mini/fitting/selection.py": [
        ("if other != fold] or [fold]", "] or [fold]", "selection a_folds_rows_are_judged"),
        ("[other for other in every if other != fold]", "list(every)", "selection the_whole_rule"),
        ("if after < before:", "if True:", "selection a_temperature_is_kept"),
    ],
    "ia2mini/fitting/probe.py": [
        ("W = W / deviation", "W = W", "probe scikit_learns"),
        ("penalty / 2 * coeff", "penalty * coeff", "probe scikit_learns"),
        ("set(range(len(states))) - set(test)", "range(len(states))", "held_out never_saw"),
    ],
    "ia2mini/fitting/measures.py": [
        ("(rows + 1) * (1 - coverage)", "rows * (1 - coverage)", "predictor coverage_of_few"),
    ],
    "ia2mini/fitting/predictor.py": [
        ("(scores.double() / temperature)", "scores", "predictor probabilities_are"),
        ("and not icl:", "and True:", "probe saved_loaded"),
    ],
    "ia2mini/generate.py": [
        (">= characters + CHARACTER_BYTES", ">= 0", "ends a_stop_text_of_characters"),
        (
            "return decode(ids[-tokens:])",
            "return decode(ids[-1:])",
            "generate a_stop_text_wherever",
        ),
        ("if decode(found) == before:", "if True:", "generate a_stop_text_inside"),
        (
            "cache.lengths += last + 1",
            "cache.lengths += ids.shape[1]",
            "generate runs_side_by_side",
        ),
    ],
    "ia2mini/engine/experiment.py": [
        ("weights[number, [rate]]", "weights[0, [rate]]", "tuned tuned_teachers_targets"),
        ("mean(0).argmin()", "mean(0).argmax()", "tuned tuned_teachers_targets"),
    ],
    "bench/studies/sdft.py": [
        ("divergence = own.exp()", "divergence = teacher.exp()", "tuned sdfts_loss"),
    ],
    "bench/studies/bayes.py": [
        ("mean = U.T @ B @ A", "mean = A", "bayes without_noise"),
    ],
    "ia2mini/teacher.py": [
        ("icl_dev=rows[n:labelled]", "icl_dev=rows[n:]", "unlabelled only_ia2"),
    ],
    "ia2mini/tokenizer.py": [
        ("special and not isinstance(text, Rendered)", "special", "chat many_templates"),
    ],
    "ia2mini/files/tokenizer_files.py": [
        ('"added_tokens_decoder" not in settings and ', "", "chat special_tokens_come"),
    ],
    "ia2mini/cli/rows.py": [
        ("if not is_ready(stream):", "if False:", "predictor lines_as_they_come"),
    ],
    "ia2mini/tasks/chat.py": [
        ('environment.filters["tojson"] = tojson', "pass", "chat many_templates"),
        ("return Rendered(text)", "return text", "chat rendering_equals"),
    ],
    "ia2mini/files/__init__.py": [
        ("pid.isdecimal() and not alive(int(pid)):", "pid.isdecimal():", "runs what_killed"),
    ],
    "ia2mini/engine/select.py": [
        (
            "if value is None or math.isnan(value):",
            "if value is None:",
            "summary diverged_is_never",
        ),
    ],
    "ia2mini/engine/store.py": [
        ("by_phase.get(phase, 0.0) + took", "took", "runs seconds_add"),
        ('(".json", ".safetensors")', '(".safetensors",)', "runs checkpoint_digest_sees"),
    ],
    "ia2mini/tasks/delimited.py": [
        ("line + reader.line_num", "line - 1 + reader.line_num", "delimited lines_are_those"),
    ],
    "ia2mini/tasks/catalog.py": [
        ("self.blank + self.labels[label]", "self.labels[label]", "columns what_is_taken"),
        ("rows[: -task.held_out]", "rows", "sources forty_lines"),
    ],
    "ia2mini/report/markup.py": [
        ("return html.escape(", "return html.escape(quote=False, s=", "page nothing_in_a_document"),
    ],
}


def tests_of(file: str, word: str) -> list[str]:
    """pytest's names of the tests in a file whose names hold a word."""
    path = ROOT / "tests" / f"test_{file}.py"
    return [
        f"tests/{path.name}::{name}"
        for name in re.findall(rf"^def (test_\w*{word}\w*)\(", path.read_text(), re.M)
    ]


def misfits() -> list[str]:
    """What is wrong with the table, in sentences: a line that is gone, a break that is no Python, an unknown test."""
    said = []
    for file, some in MUTANTS.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        for old, new, test in some:
            if (times := source.count(old)) != 1:
                said.append(f"{file}: {old!r} occurs {times} times, not once")
                continue
            try:
                ast.parse(source.replace(old, new))
            except SyntaxError as error:
                said.append(f"{file}: {new!r} for {old!r} is no Python ({error.msg})")
            if len(tests_of(*test.split())) != 1:
                said.append(f"{file}: {test!r} names {len(tests_of(*test.split()))} tests, not one")
    return said


def copy_tree(folder: Path) -> None:
    shutil.copy(ROOT / "setup.cfg", folder)
    for name in TREE:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "models")
        )
    (folder / "ia2mini" / "models").symlink_to("../models")  # as `package_dir` in setup.cfg has it


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether these tests pass on the copy; a test that hangs does not. No tests, or no pytest, is an error."""
    more = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | more,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        sys.exit(
            f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0


def main(words: list[str]) -> None:
    if wrong := misfits():
        sys.exit("\n".join(wrong))
    chosen = [(file, *mutant) for file, some in MUTANTS.items() for mutant in some]
    chosen = [m for m in chosen if not words or any(word in f"{m[0]} {m[1]}" for word in words)]
    with TemporaryDirectory() as name:
        copy_tree(folder := Path(name).resolve())
        tests = list(
            dict.fromkeys(test for *_, words in chosen for test in tests_of(*words.split()))
        )
        if not passes(folder, tests):
            sys.exit("the tests fail before anything is broken")
        survivors = []
        for file, old, new, words in chosen:
            source, begun = (folder / file).read_text(encoding="utf-8"), time.perf_counter()
            (folder / file).write_text(source.replace(old, new), encoding="utf-8")
            survived = passes(folder, tests_of(*words.split()))
            (folder / file).write_text(source, encoding="utf-8")
            survivors += [f"{file}: {old}"] * survived
            verdict = "survived" if survived else "caught"
            print(
                f"{verdict:<9}{time.perf_counter() - begun:5.1f} s  {file}: {old} → {new}",
                flush=True,
            )
    caught = len(chosen) - len(survivors)
    print(f"{caught} of {len(chosen)} caught; survivors: {', '.join(survivors) or 'none'}")
    sys.exit(caught < ENOUGH * len(chosen))


if __name__ == "__main__":
    main(sys.argv[1:])
