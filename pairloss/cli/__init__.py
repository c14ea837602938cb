"""The command line: pairloss demo, train, info, check."""

import functools
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ..checks import METRICS
from . import autoencoder, check, data, errors, info, report
from .errors import InputError
from .measure import PeakMemory

app = typer.Typer(
    help="Fused pairwise losses for PyTorch: see what the soft nearest neighbour loss does, and what runs on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Folder for pairloss.png and results.json.")]
Epochs = Annotated[int, typer.Option(help="Full-batch steps.")]
Backend = Annotated[str | None, typer.Option(help="Engine: torch, triton or reference; the best that can run if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:NUMBER; the GPU if there is one.")]

EPOCHS, FACTOR, CODE_UNITS, LR, TEST_FRACTION, SEED = 80, 0.05, 10, 1e-3, 0.5, 0


@app.command()
def demo(out: Out = Path("out"), epochs: Epochs = EPOCHS, backend: Backend = None, device: Device = None) -> None:
    """A minute's training on digits, with and without the loss."""
    with errors.reported():
        run_training("digits", "anneal", FACTOR, epochs, CODE_UNITS, LR, "cosine", TEST_FRACTION, SEED, device, backend, out)


@app.command()
def train(
    source: Annotated[str, typer.Option("--data", help="digits, or an .npz file with features [N, D] and labels [N].")] = "digits",
    tau: Annotated[str, typer.Option(help="Temperature: a number, or anneal for 1 / (1 + epoch)^0.55.")] = "anneal",
    factor: Annotated[float, typer.Option(help="Weight of the loss beside the reconstruction error.")] = FACTOR,
    epochs: Epochs = EPOCHS,
    code_units: Annotated[int, typer.Option(help="Width of the code.")] = CODE_UNITS,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = LR,
    metric: Annotated[str, typer.Option(help="cosine, sqeuclidean or dot.")] = "cosine",
    test_fraction: Annotated[float, typer.Option(help="Share of the rows kept for the test.")] = TEST_FRACTION,
    seed: Annotated[int, typer.Option(help="Of the initial weights; the split is always the same.")] = SEED,
    device: Device = None,
    backend: Backend = None,
    out: Out = Path("out"),
) -> None:
    """The same on your data, with your options."""
    with errors.reported():
        run_training(source, tau, factor, epochs, code_units, lr, metric, test_fraction, seed, device, backend, out)


app.command()(info.info)
app.command()(check.check)


def run_training(
    source: str,
    tau: str,
    factor: float,
    epochs: int,
    code_units: int,
    lr: float,
    metric: str,
    test_fraction: float,
    seed: int,
    device: str | None,
    backend: str | None,
    out: Path,
) -> None:
    """Check everything, then train both, then report."""
    begin = time.perf_counter()
    errors.between("--factor", factor, 0, open_low=True)
    errors.between("--epochs", epochs, 1)
    errors.between("--code-units", code_units, 1)
    errors.between("--lr", lr, 0, open_low=True)
    errors.between("--test-fraction", test_fraction, 0, 1, open_low=True)
    errors.between("--seed", seed, 0, 2**63)
    errors.choice("--metric", metric, METRICS)
    on = errors.device(device)
    errors.backend_runs(backend, on)
    settings = autoencoder.Settings(temperature(tau), factor, epochs, code_units, lr, metric, seed, on, backend)
    dataset = data.load(source, test_fraction)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: can't make the folder {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"--out: can't write into {out}")

    console = errors.console()
    display, memory, runs = report.Display(settings), PeakMemory(on), {}
    try:
        with display.live(console):
            for name, weight in ((report.PLAIN, 0.0), (report.WITH_SNNL, factor)):
                display.start(name)
                runs[name] = autoencoder.train(dataset, settings, weight, memory, functools.partial(display.update, name))
    except autoencoder.Diverged as error:
        typer.echo(f"pairloss: {error}", err=True)
        raise typer.Exit(1) from None

    plain, with_snnl = runs[report.PLAIN], runs[report.WITH_SNNL]
    outcome = report.Outcome(dataset, settings, plain, with_snnl, report.accuracies(dataset, plain, with_snnl))
    from .picture import draw  # matplotlib takes a second to import

    draw(outcome, out / "pairloss.png")
    report.write_json(outcome, time.perf_counter() - begin, out / "results.json")
    console.print(report.summary(outcome))
    console.print(
        f"{time.perf_counter() - begin:.0f} s in all; written to {out}: pairloss.png, results.json", soft_wrap=True, highlight=False
    )


def temperature(text: str) -> float | None:
    if text == "anneal":
        return None
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"--tau: expected a number > 0 or anneal, got {text!r}") from None
    errors.between("--tau", value, 0, open_low=True)
    return value
