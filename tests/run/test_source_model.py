"""The source model in torch is exact in any stored precision, and answers in batches as it does one by one."""

import re

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.run.source_model import Torch, _batches


def test_bfloat16_weights_are_computed_in_float32(tiny_checkpoint):
    """The logits of a bfloat16 checkpoint are those of the same weights widened to float32 beforehand."""
    source = Torch(tiny_checkpoint)
    assert source.model.dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = list(range(20, 60))
    expected = wide(torch.tensor([ids])).logits[0].detach().numpy()
    np.testing.assert_allclose(source.logits(ids, last=40), expected, atol=1e-5)
    np.testing.assert_allclose(source.logits(ids, last=3), expected[-3:], atol=1e-5)


def test_answers_in_batches(tiny_checkpoint, capsys):
    """Prompts of different lengths, answered together, get the answers that each gets alone, in their order."""
    source = Torch(tiny_checkpoint)
    prompts = [list(range(start, start + length)) for start, length in ((30, 9), (80, 2), (50, 30))]
    logits = {}
    answers = source.answer(prompts, max_new_tokens=12, on_logits=logits.__setitem__)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = source.logits(prompt + answer[:-1], last=len(answer))
        np.testing.assert_allclose(logits[index], expected, atol=1e-4)
    assert answers == [source.generate(prompt, max_new_tokens=12).ids for prompt in prompts]
    assert re.fullmatch(r"answering prompts: 3 of 3 in \d\d:\d\d\n", capsys.readouterr().out)


def test_batches():
    """Prompts are batched shortest first, within the limits of prompts and of tokens with padding."""
    assert list(_batches([5, 2000, 3, 1500])) == [[2, 0], [3, 1]]
    assert list(_batches([1700, 5, 3000])) == [[1, 0], [2]]
    assert [len(batch) for batch in _batches([7] * 70)] == [32, 32, 6]


def test_residual_peak(tiny_checkpoint):
    """The residual peak is that of the answered prompts' own tokens, read one by one; padding does not count."""
    source = Torch(tiny_checkpoint)
    with torch.no_grad():
        embedding = source.model.get_input_embeddings().weight
        embedding[source.eos_token_ids()[0]] = 1000  # pads prompts, and ends none of the answers
        embedding[80] = 50
    prompts = [[30, 31, 80], list(range(30, 50))]
    answers = source.answer(prompts, max_new_tokens=4)
    states = []
    for prompt, answer in zip(prompts, answers, strict=True):
        read = source.model(torch.tensor([prompt + answer[:-1]]), output_hidden_states=True)
        # The last state is already normed. The last norm's input is not listed, but does not hold the peak here.
        states += [float(state.abs().max()) for state in read.hidden_states[:-1]]
    assert 50 <= source.residual_peak < 100
    np.testing.assert_allclose(source.residual_peak, max(states), rtol=0.05)
