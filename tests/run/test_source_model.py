"""The source model in torch is exact in any stored precision, and reads many texts as it does one by one."""

import copy
import re

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipeline.run.source_model import Torch


def test_bfloat16_weights_are_computed_in_float32(tiny_checkpoint):
    """The logits of a bfloat16 checkpoint are those of the same weights widened to float32 beforehand."""
    source = Torch(tiny_checkpoint)
    assert source.model.dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = list(range(20, 60))
    expected = wide(torch.tensor([ids])).logits[0].detach().numpy()
    np.testing.assert_allclose(source.logits(ids, last=40), expected, atol=1e-5)
    np.testing.assert_allclose(source.logits(ids, last=3), expected[-3:], atol=1e-5)


def test_texts_of_different_lengths(tiny_checkpoint, capsys):
    """Texts that are read together get the logits and the peak of the residual stream that each gets alone."""
    source = Torch(tiny_checkpoint)
    with torch.no_grad():
        source.model.get_input_embeddings().weight[80] = 50
    texts = [list(range(start, start + length)) for start, length in ((30, 9), (80, 2), (50, 30))]
    positions = [[8], [0, 1], [29, 3]]
    wide = copy.deepcopy(source.model).float()
    ends: list[float] = []  # the states before the last norm are not among the hidden states
    wide.model.norm.register_forward_pre_hook(lambda norm, inputs: ends.append(float(inputs[0].abs().max())))
    found = list(source.read(texts, positions=positions))
    assert len(found) == 3
    for text, wanted, (logits, peak) in zip(texts, positions, found, strict=True):
        expected = wide(torch.tensor([text]), output_hidden_states=True)
        np.testing.assert_allclose(logits, expected.logits[0, wanted].detach().numpy(), atol=1e-4)
        largest = max(ends[-1], *(float(state.abs().max()) for state in expected.hidden_states[:-1]))
        np.testing.assert_allclose(peak, largest, rtol=0.05)
    assert found[0][1] < 50 <= found[1][1]
    assert re.fullmatch(r"reading texts, layer by layer: 2 of 2 in \d\d:\d\d\n", capsys.readouterr().out)
