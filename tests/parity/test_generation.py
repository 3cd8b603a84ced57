"""Generation beside transformers': processed logits, greedy text, padding, stops, penalties."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moe_ref import Transformer, TransformerConfig, checkpoints
from moe_ref.generation import generate, scored
from moe_ref.sampling import Sampling, process

CONFIG = TransformerConfig(320, 64, 2, 8, 56, n_kv_heads=2, n_experts=8, k=2, rope_theta=1e6)
OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
]
THEIRS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    ours, folder = Transformer(CONFIG).eval(), tmp_path_factory.mktemp("model")
    with torch.no_grad():
        ours.head.weight.mul_(8)  # shares far from level, as after training
    checkpoints.save(ours, folder)
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def held(tokens, vocab=320):
    return torch.zeros(len(tokens), vocab, dtype=torch.bool).scatter_(1, tokens, True)


@pytest.mark.parametrize("vocab", [5, 320, 5000])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_processed_logits_are_those_of_transformers_to_the_bit(options, vocab, spread):
    torch.manual_seed(vocab)
    logits = torch.randn(64, vocab) * spread
    tokens = torch.randint(0, vocab, (64, 9))
    steps = [THEIRS[name](options[name]) for name in THEIRS if name in options]
    expected = LogitsProcessorList(steps)(tokens, logits.clone())
    assert torch.equal(process(logits, Sampling(**options), held(tokens, vocab)), expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_filters_and_their_order_are_those_of_their_generate(pair, options):
    _, theirs = pair
    torch.manual_seed(0)
    prompt = torch.randint(1, 320, (3, 5))
    made = theirs.generate(
        prompt,
        max_new_tokens=6,
        do_sample=True,
        **({"top_k": 0} | options),
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for step, (logits, expected) in enumerate(zip(made.logits, made.scores, strict=True)):
        seen = held(made.sequences[:, : 5 + step])
        assert torch.equal(process(logits, Sampling(**options), seen), expected)


def test_greedy_text_of_padded_prompts_and_its_log_probabilities_are_those_of_transformers(pair):
    ours, theirs = pair
    torch.manual_seed(1)
    sequences = [torch.randint(1, 320, (n,)).tolist() for n in (7, 2, 5, 1)]
    mask = torch.tensor([[column >= 7 - len(s) for column in range(7)] for s in sequences])
    tokens = torch.tensor([[0] * (7 - len(s)) + s for s in sequences])
    made = theirs.generate(
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generate(ours, tokens, 10, mask=mask), made.sequences)
    new = made.sequences[:, 7:]
    texts = generate(ours, sequences, 10)
    assert [text.tolist() for text in texts] == [
        s + row for s, row in zip(sequences, new.tolist(), strict=True)
    ]
    expected = torch.stack(made.logits, dim=1).log_softmax(dim=-1).gather(2, new[..., None])[..., 0]
    torch.testing.assert_close(
        torch.stack(scored(ours, sequences, 10).log_probs), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_text_with_penalty_and_stops_is_that_of_transformers(pair, penalty):
    ours, theirs = pair
    torch.manual_seed(2)
    prompt = torch.randint(1, 320, (4, 6))
    free = generate(ours, prompt, 12, repetition_penalty=penalty)[:, 6:]
    stops = [int(free[0, 3]), int(free[2, 7])]
    expected = theirs.generate(
        prompt,
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=stops,
        pad_token_id=0,
    )[:, 6:].tolist()
    texts = generate(ours, prompt.tolist(), 12, repetition_penalty=penalty, stop=stops)
    for text, row in zip(texts, expected, strict=True):
        new = text[6:].tolist()
        assert row == new + [0] * (len(row) - len(new))  # they fill up with padding
        assert new[-1] in stops or len(new) == 12
