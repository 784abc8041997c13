"""Chat with a model from a registry on onnxruntime-genai: `python chat.py URL [QUESTION ...]`."""

import json
import sys

import onnxruntime_genai as og

from pipeline import open_registry, pull

MODEL = "smol-phi3/onnx-cpu-int4"


def main() -> None:
    """Pull the model, then answer the questions on the command line, or, if there are none, those that are typed."""
    if len(sys.argv) < 2:
        sys.exit("usage: python chat.py URL [QUESTION ...]")
    sys.stdout.reconfigure(errors="replace")  # a pipe on Windows lacks some characters of an answer
    directory = pull(open_registry(sys.argv[1]), MODEL, progress=show)
    model = og.Model(str(directory))
    tokenizer = og.Tokenizer(model)
    messages = []
    for question in sys.argv[2:] or iter(lambda: input("you> "), ""):
        messages.append({"role": "user", "content": question})
        ids = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 256)
        generator, stream, answer = og.Generator(model, parameters), tokenizer.create_stream(), ""
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            text = stream.decode(generator.get_next_tokens()[0])
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


def show(done: int, total: int, file: str) -> None:
    """Print the progress of the download."""
    print(f"\r{done / total:4.0%} {file:40}", end="\n" if done == total else "", file=sys.stderr)


if __name__ == "__main__":
    main()
