"""Chat with a model from a registry on openvino-genai: `python chat.py URL [QUESTION ...]`."""

import sys

import openvino_genai

from pipeline import open_registry, pull

MODEL = "smol-phi3/openvino-int4"


def main() -> None:
    """Pull the model, then answer the questions on the command line, or, if there are none, those that are typed."""
    if len(sys.argv) < 2:
        sys.exit("usage: python chat.py URL [QUESTION ...]")
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows lacks some characters of an answer
    directory = pull(open_registry(sys.argv[1]), MODEL, progress=show)
    options = {}
    if "longrope" in (directory / "config.json").read_text():
        # Such a model computes other keys for a long text, so it must read each prompt anew and in one piece.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, 131072
        options = {"scheduler_config": scheduler}
    pipeline = openvino_genai.LLMPipeline(directory, "CPU", **options)
    history = openvino_genai.ChatHistory()
    for question in sys.argv[2:] or iter(lambda: input("you> "), ""):
        history.append({"role": "user", "content": question})
        result = pipeline.generate(history, max_new_tokens=256, streamer=stream)
        print()
        history.append({"role": "assistant", "content": result.texts[0]})


def show(done: int, total: int, file: str) -> None:
    """Print the progress of the download."""
    print(f"\r{done / total:4.0%} {file:40}", end="\n" if done == total else "", file=sys.stderr)


def stream(text: str) -> None:
    """Print a piece of the answer."""
    print(text, end="", flush=True)


if __name__ == "__main__":
    main()
