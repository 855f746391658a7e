"""The command line: one short file per verb beside this one; here they are put together and errors are shown."""

from __future__ import annotations

import logging
import signal
import sys
import warnings

import typer

from moesteer.cli import (
    audit,
    capture,
    compare_logs,
    demo,
    detect,
    doctor,
    drift,
    evaluate,
    generate,
    judges,
    lab,
    listing,
    lm_eval,
    mask,
    models,
    report,
    serve,
    steer,
    suites,
    ui,
)
from moesteer.errors import MoesteerError

app = typer.Typer(
    name="moesteer",
    help="Steer the routers of Mixture-of-Experts language models. Begin with `moesteer demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("steer")(steer.steer)
app.command("capture")(capture.capture)
app.command("detect")(detect.detect)
app.add_typer(mask.app, name="mask")
app.command("drift")(drift.drift)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("audit")(audit.audit)
app.command("serve")(serve.serve)
app.command("ui")(ui.ui)
app.command("lm-eval", context_settings=lm_eval.PASSED_ON)(lm_eval.lm_eval)
app.command("compare-logs")(compare_logs.compare_logs)
app.command("report")(report.report)
app.add_typer(models.app, name="models")
app.command("methods")(listing.methods)
app.command("suites")(suites.suites)
app.command("judges")(judges.judges)
app.add_typer(lab.app, name="lab")
app.command("doctor")(doctor.doctor)


STOPPED = 130


def run() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 bad usage or input, 3 a constraint or check not met, 130 stopped."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("torchao", "torch.utils._pytree"):  # both complain on import, about kernels for other machines
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except MoesteerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:  # typer makes an exit of the first
        if isinstance(ended, SystemExit) and ended.code != STOPPED:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not make a failure of it
        print("stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(STOPPED)
    except (ImportError, RuntimeError) as error:
        from moesteer.doctor import broken_torchvision  # transformers says a dozen things where that is the reason

        why = broken_torchvision()
        if why is None:
            raise
        print(f"error: torchvision does not fit: {why}\n  instead of: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    run()
