"""The published models. `python -m pytest -m network` runs these tests and downloads 13 GB."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from hub.find import find_model_folder
from load_gpt2_weights import load_model
from talking.decoder import Decoder
from test_gpt_model import PARAMETERS

pytestmark = pytest.mark.network
MODELS = {
    **PARAMETERS,
    "microsoft/DialoGPT-small": PARAMETERS["gpt2"],
    "microsoft/DialoGPT-medium": PARAMETERS["gpt2-medium"],
    "microsoft/DialoGPT-large": PARAMETERS["gpt2-large"],
}


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_has_the_logits_of_transformers(name, tmp_path):
    """It also has its published size, and completes a sentence about capitals sensibly."""
    folder = find_model_folder(name, tmp_path)
    model, tokenizer = load_model(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name]
    ids = torch.tensor([tokenizer.encode_ordinary("The capital of France is Paris. The capital of Italy is")])
    with torch.inference_mode():
        logits = model.eval()(ids)
        reference = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=1e-5)
        decoding = Decoder(model).start(torch.zeros(1, dtype=torch.long), 32)
        next_token = tokenizer.decode([int(decoding.next_logits(ids).argmax())])
    if "DialoGPT" not in name:  # those models answer instead of continuing the text
        assert next_token in (" Rome", " Milan", " Florence", " Venice", " the", " Naples", " Turin")
