"""The command line: `invgen demo | train | sample | evaluate | invert | report | priors | solvers`.

Options of operators, noises and solvers are those of the classes' own signatures. What a person gets wrong ends with exit
code 2 and one sentence; set INVGEN_DEBUG=1 to see the traceback as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invgen.posterior import Posterior

__all__ = ["main"]

COMMANDS = {
    "demo": "invert an embedded seismic section and write a report",
    "train": "train a prior on an array or on generated examples, resumable",
    "sample": "draw from a prior",
    "evaluate": "compare a prior's draws with held-out examples",
    "invert": "draw from a posterior",
    "report": "write the HTML page of a saved posterior",
    "priors": "list priors, what they can do, and pretrained ones",
    "solvers": "list solvers and what they need",
}


class _Exit(SystemExit):
    """Exit with one sentence on stderr."""

    def __init__(self, message: str, code: int = 2) -> None:
        print(f"invgen: {' '.join(message.split())}", file=sys.stderr)
        super().__init__(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `invgen` command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: invgen COMMAND [options]\n\nBayesian inverse problems with learned priors.\n\ncommands:")
        print("\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items()))
        print("\n`invgen COMMAND --help` lists its options; `invgen --version` prints the version.")
        return
    if words[0] == "--version":
        from invgen import __version__

        print(f"invgen {__version__}")
        return
    if words[0] not in COMMANDS:
        raise _Exit(f"there is no command {words[0]!r}; commands are {', '.join(COMMANDS)}.")
    run: Callable[[list[str]], None] = globals()[f"_{words[0]}"]
    try:
        run(words[1:])
    except KeyboardInterrupt:
        raise _Exit("interrupted before anything was finished.", 130) from None
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        if os.environ.get("INVGEN_DEBUG"):
            raise
        raise _Exit(str(error) or type(error).__name__) from None


# --- parsers -----------------------------------------------------------------------------------------------------------


def _parser(command: str, out: str | None, extra: str = "") -> Any:
    """A parser with the common flags of a command."""
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(
        prog=f"invgen {command}", description=f"{COMMANDS[command]}. {extra}".strip(), exit_on_error=False
    )
    if out is not None:
        from jsonargparse.typing import NonNegativeInt

        parser.add_argument("--seed", type=NonNegativeInt, default=0, help="decides every random number")
        parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:0, …")
        parser.add_argument("--out", type=str, default=out, help="where the result goes")
        parser.add_argument(
            "--progress", action=ActionYesNo(no_prefix="no-"), default=sys.stderr.isatty(), help="show progress bars"
        )
    return parser


def _parse(parser: Any, words: list[str]) -> Any:
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        from invgen._config import sentence

        raise _Exit(sentence(error)) from None


def _check_device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name).item()  # "meta" keeps no numbers
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"The device {name!r} cannot be used here ({' '.join(str(error).split())[:120]}); use cpu."
        ) from error
    return name


def _take(words: list[str], flag: str) -> str | None:
    """Remove `--flag VALUE` and `--flag=VALUE` from the words and return the last value."""
    found, i = None, 0
    while i < len(words):
        head, equals, value = words[i].partition("=")
        if head != flag:
            i += 1
            continue
        if not equals and i + 1 == len(words):
            raise _Exit(f"{flag} needs a value.")
        found = value if equals else words[i + 1]
        del words[i : i + (1 if equals else 2)]
    return found


def _prior(spec: Any, shape: Sequence[int] | None, allow_import: bool) -> Any:
    """A prior from a pretrained name, a checkpoint or a class, moved to `shape` if given."""
    from invgen._config import build
    from invgen.priors import pretrained
    from invgen.priors.loading import load_prior

    if isinstance(spec, str) and spec in pretrained.available():
        prior: Any = pretrained.load(spec)
    elif isinstance(spec, str) and (spec.endswith(".safetensors") or os.sep in spec or Path(spec).is_file()):
        prior = load_prior(spec)
    elif isinstance(spec, str) and spec.isidentifier() and spec.islower():
        raise ValueError(
            f"There is no pretrained prior {spec!r}; available are: {', '.join(pretrained.available()) or 'none in this installation'}. A checkpoint is given by its path."
        )
    else:
        prior = build(spec, what="prior", allow_import=allow_import)
    if not (hasattr(prior, "sample") and hasattr(prior, "shape")):
        raise ValueError(f"{type(prior).__name__} is not a prior; see `invgen priors`.")
    if shape is not None:
        if not hasattr(prior, "at"):
            raise ValueError(f"{type(prior).__name__} cannot be moved to another shape; leave the shape out.")
        prior = prior.at(tuple(shape))
    return prior


# --- commands ----------------------------------------------------------------------------------------------------------


def _demo(words: list[str]) -> None:
    parser = _parser("demo", "demo", "Needs nothing but this installation.")
    parser.add_argument(
        "--num_samples", type=int, default=19, help="samples; the min–max band of 19 is a nominal 90 %% band"
    )
    options = _parse(parser, words)
    from invgen._config import check_output
    from invgen.demo import run_demo

    if options.num_samples < 2:
        raise ValueError(f"The demo shows a spread and needs --num_samples of at least 2, got {options.num_samples}.")

    check_output(Path(options.out) / "report.html")
    path = run_demo(
        options.out,
        num_samples=options.num_samples,
        seed=options.seed,
        device=_check_device(options.device),
        progress=options.progress,
    )
    print(f"Wrote {path}.")


def _sample(words: list[str]) -> None:
    parser = _parser("sample", "samples.npy")
    parser.add_argument("--prior", type=str, required=True, help="name of a pretrained prior, checkpoint, or class")
    parser.add_argument("--n", type=int, default=4, help="number of draws")
    parser.add_argument(
        "--shape",
        type=list[int] | None,
        default=None,
        help="spatial shape, e.g. [64,64]; the training shape when omitted",
    )
    parser.add_argument("--steps", type=int | None, default=None, help="noise levels of a diffusion prior")
    options = _parse(parser, words)
    from invgen._config import check_output
    from invgen.data.io import write_array

    if options.n < 1 or (options.steps is not None and options.steps < 1):
        raise ValueError(f"--n and --steps must be at least 1, got {options.n} and {options.steps}.")
    out = check_output(options.out, ".npy")
    prior = _prior(options.prior, options.shape, False)
    if hasattr(prior, "to"):
        prior = prior.to(_check_device(options.device))
    settings = {} if options.steps is None else {"steps": options.steps}
    x = prior.sample(options.n, seed=options.seed, **settings)
    print(f"Wrote {write_array(out, x.cpu().numpy())}: {' × '.join(map(str, x.shape))}.")


def _evaluate(words: list[str]) -> None:
    from invgen._evaluate import evaluate

    print(evaluate(words, _parser, _parse, _prior, _check_device))


def _invert(words: list[str]) -> None:
    from invgen._invert import invert_options, invert_problem

    words = list(words)
    options, specs, allow_import = invert_options(words, _parser, _parse, _take)
    import torch

    from invgen._config import check_output

    out = check_output(options.out, ".nc", ".html")
    # now, not after hours of sampling
    if options.report is not None:
        check_output(options.report, ".html")
    if options.checkpoint is not None:
        check_output(options.checkpoint)
    if options.segy is not None:
        check_output(Path(options.segy) / "mean.sgy")
    device = _check_device(options.device)
    problem, solver, section, remarks = invert_problem(specs, options, allow_import, _prior)
    for remark in remarks:
        print(f"{remark}.")
    for part in (problem.prior, *(t.operator for t in problem.terms)):  # the driver moves data and states only
        if hasattr(part, "to"):
            part.to(device)
    try:
        posterior: Posterior = solver.solve(
            problem,
            options.num_samples,
            seed=options.seed,
            device=device,
            progress=options.progress,
            checkpoint=options.checkpoint,
            dtype=getattr(torch, options.dtype),
        )
    except KeyboardInterrupt:
        if options.checkpoint is not None and Path(options.checkpoint).is_file():
            raise _Exit(
                f"interrupted; give the same command again to continue from {options.checkpoint}.", 130
            ) from None
        raise
    path = posterior.save(out) if out.suffix == ".nc" else posterior.report(out)
    print(f"Wrote {path}: {posterior}.")
    if section is not None:
        from invgen.data.segy import export_segy

        written = export_segy(posterior, options.segy, like=section)
        print(f"Wrote {len(written)} SEG-Y files to {options.segy}: {', '.join(list(written)[:3])} ….")
    if options.report is not None:
        print(f"Wrote {posterior.report(options.report)}.")


def _report(words: list[str]) -> None:
    parser = _parser(
        "report",
        None,
        "The data fit needs the problem, which a file does not hold: use `invgen invert --report` for it.",
    )
    parser.add_argument("posterior", type=str, help="a .nc file written by invgen invert or Posterior.save")
    parser.add_argument("--out", type=str, default="report.html", help="the page to write")
    parser.add_argument("--truth", type=str | None, default=None, help=".npy of the true model, where it is known")
    parser.add_argument("--title", type=str | None, default=None, help="headline")
    parser.add_argument("--observation", type=int, default=0, help="which of several observations")
    options = _parse(parser, words)
    import torch

    from invgen._config import check_output
    from invgen.data.io import read_array
    from invgen.posterior import Posterior

    out = check_output(options.out, ".html")
    posterior = Posterior.load(options.posterior)
    truth = None if options.truth is None else torch.from_numpy(read_array(options.truth))
    print(f"Wrote {posterior.report(out, truth=truth, title=options.title, observation=options.observation)}.")


def _train(words: list[str]) -> None:
    from invgen._train import train

    print(train(words, _parser, _parse, _take, _check_device))


def _priors(words: list[str]) -> None:
    _parse(_parser("priors", None), words)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from invgen._tables import heads, prior_rows
    from invgen.priors import pretrained

    table = Table("prior", *heads(), "what it is")
    for name, has, text in prior_rows():
        table.add_row(name, *("✓" if h else "–" for h in has), escape(text))
    console = Console()
    console.print(table)
    shelf = Table("pretrained", "shape", "trained on", "steps")
    for name in pretrained.available():
        card = pretrained.card(name)
        shape = " × ".join(map(str, pretrained.load(name).shape))
        shelf.add_row(name, shape, str(card.get("data", "")), str(card.get("steps", "")))
    console.print(shelf)


def _solvers(words: list[str]) -> None:
    _parse(_parser("solvers", None), words)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from invgen._tables import solver_rows

    table = Table("solver", "result", "prior must have", "what it is")
    for row in solver_rows():
        table.add_row(*map(escape, row))
    Console().print(table)


if __name__ == "__main__":
    main()
