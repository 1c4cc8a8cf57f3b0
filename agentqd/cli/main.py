"""The entry of `agentqctl`: runs one verb and turns whatever happens into an exit code.

Only `sys` and what Python has loaded anyway are imported up here, so that Ctrl-C in the first milliseconds is quiet too.
"""

from __future__ import annotations

import gc
import os
import sys

EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141
COMPLETION_VARIABLE = "_AGENTQCTL_COMPLETE"


def main() -> int:
    """The console script."""
    try:
        return run(sys.argv[1:])
    except KeyboardInterrupt:
        _forget_stdout()
        return EXIT_INTERRUPTED


def run(argv: list[str]) -> int:
    """One command, from its arguments to its exit code; everything is flushed."""
    if sys.stdout is None or sys.stderr is None:  # started with a closed descriptor: `>&-`
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        sys.stdout = sys.stdout or nowhere
        sys.stderr = sys.stderr or nowhere

    gc.disable()  # nothing that is imported is garbage: 3 ms less; `Verb` enables it again
    if "AGENTQCTL_BOX" in os.environ or any(word.startswith("--box") for word in argv):
        from agentqd.cli.warm import warm_up

        warm_up(argv, os.environ)  # a connection is made while we are still importing
    import click

    from agentqd.cli.group import agentqctl
    from agentqd.cli.output import OutputClosedError
    from agentqd.core.errors import AgentqError

    try:
        if COMPLETION_VARIABLE in os.environ:
            agentqctl.main(args=argv, prog_name="agentqctl")  # answers the shell and exits
        # Not click's own main(): it prints on Ctrl-C and has its own mind about closed pipes.
        with agentqctl.make_context("agentqctl", list(argv)) as context:
            code = agentqctl.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        sys.stdout.flush()
        return end.exit_code
    except click.ClickException as error:
        return _usage(argv, error)
    except AgentqError as error:
        return _failed(argv, error)
    except (KeyboardInterrupt, click.Abort):
        _forget_stdout()
        return EXIT_INTERRUPTED
    except (OutputClosedError, BrokenPipeError):
        _forget_stdout()
        return EXIT_OUTPUT_CLOSED
    except OSError as error:
        _forget_stdout()
        return _failed(
            argv, AgentqError(f"{error.filename or 'output'}: {error.strerror or error}", code="io_error")
        )
    return code if isinstance(code, int) else 0


def wants_json(argv: list[str]) -> bool:
    """Whether errors go to stdout as JSON, known before the arguments were understood."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    return "--json" in options


def _usage(argv: list[str], error: object) -> int:
    import click

    from agentqd.cli.output import Output, write_error
    from agentqd.cli.text import safe
    from agentqd.core.errors import EXIT_USAGE

    assert isinstance(error, click.ClickException)
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError" and not wants_json(argv):  # a class only since click 8.2
        write_error(message + "\n")
        return EXIT_USAGE
    if wants_json(argv):
        out = Output(as_json=True)
        out.json({"error": "usage", "message": message})
        out.flush()
        return EXIT_USAGE
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "agentqctl"
    write_error(f"{path}: {safe(message)}\nSee: {path} --help\n")
    return EXIT_USAGE


def _failed(argv: list[str], error: object) -> int:
    from agentqd.cli.output import Output, OutputClosedError
    from agentqd.core.errors import AgentqError

    assert isinstance(error, AgentqError)
    out = Output(as_json=wants_json(argv))
    try:
        out.error(error)
        out.flush()
    except (OutputClosedError, OSError):
        _forget_stdout()
    return error.exit_code


def _forget_stdout() -> None:
    """What is still buffered goes nowhere, so that the interpreter's own last flush cannot complain."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    sys.exit(main())
