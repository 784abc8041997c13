"""Stage report."""

from pipeline import paths, report
from pipeline.manifest import replace_file
from pipeline.params import load_params
from pipeline.process import stage_command
from pipeline.progress import say


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
