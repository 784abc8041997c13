"""Stage report."""

from pipeline.check import report
from pipeline.common import paths
from pipeline.common.files import replace_file
from pipeline.common.params import load_params
from pipeline.common.progress import say
from pipeline.process import stage_command


@stage_command
def main(model: str) -> None:
    """Write the report on all variants of MODEL, including those that failed or were not validated."""
    content = report.collect(load_params(), model=model)
    directory = paths.report(model)
    replace_file(directory / "index.html", report.render(content))
    replace_file(directory / "fidelity.csv", report.plot_rows(content, "size_bytes", "kl_mean"))
    say(f"open {directory / 'index.html'}")


if __name__ == "__main__":
    main()
