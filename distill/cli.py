"""The command `distill`: training verbs by LightningCLI, the others as typed functions under jsonargparse.

Every verb is imported only when it is called, so `distill --help` and a mistyped verb answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from distill import __version__
from distill.errors import DistillError

TRAINING_VERBS = {
    "fit": "train the students of a recipe",
    "validate": "report cosine per layer and domain for a recipe or a checkpoint",
}
VERBS = {
    "index": ("distill.data.summary", "index", "check shards and print what is in them"),
    "synthesize": ("distill.data.synthetic", "synthesize", "draw labelled images of four domains as shards"),
    "export": ("distill.export.run", "export", "write a run's student in its consumers' formats, verified by them"),
    "probe": ("distill.probe.run", "probe", "linear probe, kNN and fidelity of an encoder beside its baselines"),
    "report": ("distill.report.run", "report", "one HTML page about a run"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb of the command line.

    Args:
        arguments: the words after `distill`; None takes them from the process.

    Raises:
        SystemExit: 2 for a wrong command line, 1 for anything a user can mend (its message is printed, without a
            traceback).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
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
            import_module("distill.training_cli").run(words)
        else:
            run_function(verb, words[1:])
    except DistillError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


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
            "distill VERB --help shows a verb's options; distill --version the version.",
        ]
    )


def run_function(verb: str, words: list[str]) -> None:
    """Call a verb's function with the arguments its signature names."""
    from jsonargparse import auto_cli, set_parsing_settings

    module, name, _ = VERBS[verb]
    function: Callable[..., Any] = getattr(import_module(module), name)
    set_parsing_settings(parse_optionals_as_positionals=False)
    result: Any = auto_cli(function, args=words, as_positional=True, prog=f"distill {verb}")
    if result is not None and verb != "export":
        print(result)


if __name__ == "__main__":
    main()
