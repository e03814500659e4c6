"""The command `distill`: training verbs by LightningCLI, the others as typed functions under jsonargparse.

Every verb is imported only when it is called, so `distill --help` and a mistyped verb answer at once.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from distill import __version__
from distill.errors import DistillError, UnfinishedError
from distill.heap import keep_freed_memory
from distill.recipe_words import gather_overrides
from distill.stop_signals import close_stop_signals, stop_signals

EXIT_CODES = {
    0: "finished",
    1: "an error, whose cause was printed",
    2: "a wrong command line",
    75: "preempted or out of time (trainer.max_time): saved, run it again with --resume auto",
    76: "told to stop, and ended without saving because no step ended within the deadline; run it again as well",
    130: "Ctrl-C: saved",
}
LAST_RESORT_S = 60
"""Longest time that a command which has failed may take to leave; what hangs then is ended with a traceback."""

TRAINING_VERBS = {
    "fit": "train the students of a recipe",
    "validate": "report cosine per layer and domain for a recipe or a checkpoint",
}
VERBS = {
    "plan": ("distill.planner.verb", "plan", "what a recipe needs and costs, before anything is spent"),
    "doctor": ("distill.doctor.verb", "doctor", "check this machine, and a recipe's data, weights and run folder"),
    "cache": ("distill.cache_fill.verb", "cache", "store the teachers' hidden states; runs then need no teacher"),
    "index": ("distill.data.summary", "index", "check shards and print what is in them"),
    "pack": ("distill.data.pack", "pack", "write images as shards, without copies, from folders, lists and datasets"),
    "synthesize": ("distill.data.synthetic", "synthesize", "draw labelled images of four domains as shards"),
    "export": ("distill.export.run", "export", "write a run's student in its consumers' formats, verified by them"),
    "probe": ("distill.probe.run", "probe", "a ladder of probes and fidelity for an encoder, beside its baselines"),
    "compare": ("distill.probe.compare", "compare", "paired differences between the encoders of several probes"),
    "report": ("distill.report.run", "report", "one HTML page about one or several runs"),
    "vlm": ("distill.vlm.verb", "vlm", "train, score and time a small VLM around an encoder"),
    "ablate": ("distill.vlm.ablate", "ablate", "train and score a small VLM over a grid of encoders, connectors, data"),
}
LISTING_VERBS = ("compare", "report")
"""Verbs whose words before the first option are one list: `distill compare A B C --out FILE`."""
JSON_LIST = """'["PATH1",...]' | LIST_OF_PATHS_FILE | -"""
"""How jsonargparse describes a positional list of paths."""
RECIPE_VERBS = {"plan": "", "cache": "", "doctor": "--recipe_file="}
"""Verbs that take a recipe's own flags beside theirs, and what stands before the recipe's file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb of the command line.

    Args:
        arguments: the words after `distill`; None takes them from the process.

    Raises:
        SystemExit: with one of `EXIT_CODES`. The message of anything a user can mend is printed without a traceback.
    """
    keep_freed_memory()
    if arguments is not None:
        run_verb(list(arguments))
        return
    faulthandler.enable()  # a crash in native code says where
    try:
        run_verb(sys.argv[1:])
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (0, None):
            faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True)
        raise


def run_verb(words: list[str]) -> None:
    """Run the verb that the first word names.

    Raises:
        SystemExit: with one of `EXIT_CODES`.
    """
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        print(usage())
        return
    if verb == "--version":
        print(__version__)
        return
    if verb not in TRAINING_VERBS and verb not in VERBS:
        print(f"error: unknown verb {verb!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        if verb in TRAINING_VERBS:
            run_training(words)
        else:
            run_function(verb, words[1:])
    except UnfinishedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def run_training(words: list[str]) -> None:
    """Run a verb that Lightning trains for, with `fit` listening for signals before anything slow is imported."""
    if words[0] == "fit":
        stop_signals()
    try:
        import_module("distill.training_cli").run(words)
    finally:
        close_stop_signals()


def gather_leading(words: list[str]) -> list[str]:
    """Return the words before the first option as one JSON list, which is how jsonargparse takes a list."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [json.dumps(words[:count]), *words[count:]] if count else words


def usage() -> str:
    """Return the text of `distill --help`."""
    verbs = {**TRAINING_VERBS, **{name: entry[2] for name, entry in VERBS.items()}}
    lines = [f"  {name:<12}{text}" for name, text in verbs.items()]
    return "\n".join(
        [
            "usage: distill VERB [options]",
            "",
            "Distil large vision encoders into compact ones that plug into any small VLM.",
            "",
            *lines,
            "",
            "exit status:",
            *(f"  {code:<12}{text}" for code, text in EXIT_CODES.items()),
            "",
            "distill VERB --help shows a verb's options; distill --version the version.",
        ]
    )


def run_function(verb: str, words: list[str]) -> None:
    """Call a verb's function with the arguments its signature names."""
    from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings

    class ListParser(ArgumentParser):
        """Shows a leading list as it is given on the command line, and not as JSON."""

        def format_help(self, *args: Any, **options: Any) -> str:
            return super().format_help(*args, **options).replace(JSON_LIST, "PATH [PATH ...]")

        def format_usage(self) -> str:
            return super().format_usage().replace(JSON_LIST, "PATH [PATH ...]")

    module, name, _ = VERBS[verb]
    function: Callable[..., Any] = getattr(import_module(module), name)
    if verb in RECIPE_VERBS:
        words = gather_overrides(words, RECIPE_VERBS[verb])
    elif verb == "vlm":
        words = import_module("distill.vlm.recipe_files").gather_recipe_words(words)
    set_parsing_settings(parse_optionals_as_positionals=False)
    parser_class = ArgumentParser
    if verb in LISTING_VERBS:
        words, parser_class = gather_leading(words), ListParser
    result: Any = auto_cli(function, args=words, as_positional=True, prog=f"distill {verb}", parser_class=parser_class)
    if result is not None and verb != "export":
        print(result)


if __name__ == "__main__":
    main()
