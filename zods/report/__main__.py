"""`python -m zods.report`: a web page of one or more runs, with plots, figures and settings."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zods.config.optional_packages import PLOTS, missing_package
from zods.files import atomic_write, make_folder
from zods.report.page import page
from zods.report.panels import draw, panels
from zods.report.runs import Run, read_run


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        if missing := missing_package("python -m zods.report", *PLOTS):
            raise ValueError(missing)
        out = _output(options.out, options.folders)
        runs = [read_run(folder) for folder in options.folders]
        while options.follow and not all(run.summary for run in runs):
            _write(out, page(runs, refresh=options.interval))
            time.sleep(options.interval)
            runs = [read_run(folder) for folder in options.folders]
        _write(out, page(runs))
        if options.png is not None:
            _write_panels(options.png, runs)
        print(out)
    except (ValueError, OSError) as error:
        print(f"zods.report: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # how a report that follows a run is stopped
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zods.report", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN_FOLDER",
        help="a run's --output_dir; several are overlaid and compared",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the run's folder; needed with several runs)",
    )
    parser.add_argument(
        "--png", type=Path, metavar="FOLDER", help="also write each plot there as a PNG"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="write the page again and again until the runs have ended; the browser reloads it",
    )
    parser.add_argument(
        "--interval", type=_seconds, default=30.0, metavar="SECONDS", help="of --follow (30)"
    )
    return parser


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of seconds, 1 or more")
    return float(text)


def _output(out: Path | None, folders: Sequence[Path]) -> Path:
    if out is None and len(folders) > 1:
        raise ValueError("--out: needed with several runs. Name the file of the report.")
    return out or folders[0] / "report.html"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # names of files


def _write_panels(folder: Path, runs: Sequence[Run]) -> None:
    make_folder(folder)
    for number, panel in enumerate(panels(runs), start=1):
        name = re.sub(r"[^a-z0-9]+", "_", panel.title.lower()).strip("_")
        with atomic_write(folder / f"{number:02}_{name}.png") as temporary:
            temporary.write_bytes(draw(panel, "png"))


if __name__ == "__main__":
    sys.exit(main())
