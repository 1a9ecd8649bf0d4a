"""How `--help` shows a command: its options in four groups, and the commands in the order of their use."""

import click

GROUPS = {  # heading: the parameters below it, by their names in Python
    "What": (
        "model", "revision", "data", "eval_data", "prompt_column", "answer_column", "template", "labels", "labelled",
        "unlabelled", "context", "prompts", "prompt", "adapter", "methods", "loss", "teacher",
    ),
    "How": (
        "rank", "alpha", "targets", "rates", "layers", "betas", "soft_k", "icl", "icl_demos", "race", "select",
        "paper_compat", "seed", "balance", "temperature", "ship", "chat", "stop", "strict", "dtype", "check",
        "deterministic", "compiling", "checkpointing",
    ),
    "How much": (
        "n", "sets", "epochs", "patience", "batch_size", "eval_rows", "folds", "demonstrations", "max_tokens",
        "coverage", "side_by_side",
    ),
    "Where": (
        "device", "data_dir", "out", "digits", "full", "with_paper", "table_8", "columns", "figures", "as_json",
    ),
}  # fmt: skip
ORDER = ("fit", "predict", "score", "merge", "generate", "run", "report", "tasks", "models")


class GroupedCommand(click.Command):
    """A command whose help lists its options by what they are about."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rest = [option for option in self.get_params(context) if isinstance(option, click.Option)]
        for heading in (*GROUPS, "Help"):
            names = GROUPS.get(heading, [option.name for option in rest])
            found = [option for option in rest if option.name in names]
            rest = [option for option in rest if option not in found]
            if found:
                with formatter.section(heading):
                    formatter.write_dl([option.get_help_record(context) for option in found])
