import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import Transformer, TransformerConfig
from moe_ref.generation import generate, sample, stream

CONFIG = TransformerConfig(50, 16, 2, 4, 12, n_experts=4, k=2)


def build(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return Transformer(config)


PROMPT = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def test_greedy_takes_the_likeliest_token_of_the_uncached_model_each_time():
    model = build().eval()
    expected = PROMPT
    for _ in range(8):
        following = model(expected).logits[:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(generate(model, PROMPT, 8), expected)


def test_tokens_stream_one_by_one_as_they_are_made():
    model = build()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    flow = stream(model, PROMPT, 5)
    assert calls == []
    first = next(flow)
    assert first.shape == (2,) and len(calls) == 1
    rest = list(flow)
    assert len(rest) == 4 and len(calls) == 5
    assert torch.equal(torch.stack([first, *rest], dim=1), generate(model, PROMPT, 5)[:, 4:])


def test_the_same_seed_draws_the_same_text_and_another_seed_another():
    model = build()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = [generate(model, PROMPT, 20, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers stay


def test_samples_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    many = logits.expand(20_000, -1)
    drawn = sample(many, 0.7, 1.0, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - (logits[0] / 0.7).softmax(dim=-1)).abs().max() < 0.015


@given(st.integers(0, 999), st.floats(0.05, 1.0))
def test_top_p_draws_only_from_the_smallest_set_that_fills_it(seed, top_p):
    torch.manual_seed(seed)
    logits = torch.randn(1, 8)
    shares = logits.softmax(dim=-1)[0]
    nucleus, filled = set(), 0.0
    for token in shares.argsort(descending=True).tolist():
        nucleus.add(token)
        filled += shares[token].item()
        if filled >= top_p + 1e-6:
            break
    drawn = sample(logits.expand(200, -1), 1.0, top_p, torch.Generator().manual_seed(seed))
    assert set(drawn.tolist()) <= nucleus


@pytest.mark.parametrize(
    ("shares", "top_p", "nucleus"),
    [
        ([0.5, 0.25, 0.25], 0.5, {0}),
        ([0.5, 0.25, 0.25], 0.75, {0, 1}),
        ([0.25, 0.25, 0.25, 0.25], 0.75, {0, 1, 2}),
        ([0.5, 0.5, 0.0], 0.5, {0}),
    ],
)
def test_a_nucleus_that_fills_top_p_exactly_takes_no_further_token(shares, top_p, nucleus):
    logits = torch.tensor([shares]).log()
    assert logits.softmax(dim=-1).tolist() == [shares]
    drawn = sample(logits.expand(500, -1), 1.0, top_p, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == nucleus


def test_a_sequence_that_stopped_repeats_the_stop_and_all_stopped_end_the_stream():
    model = build()
    free = generate(model, PROMPT, 6)[:, 4:]
    stop = int(free[0, 2])
    text = generate(model, PROMPT, 6, stop=stop)[:, 4:]
    for row, unstopped in zip(text.tolist(), free.tolist(), strict=True):
        if stop in unstopped:
            end = unstopped.index(stop)
            assert row[: end + 1] == unstopped[: end + 1][: len(row)]
            assert set(row[end:]) <= {stop}
    one = generate(model, PROMPT[:1], 6, stop=int(free[0, 2]))[0, 4:].tolist()
    assert one == free[0, : free[0].tolist().index(stop) + 1].tolist()


def test_noisy_models_generate_as_in_evaluation_and_stay_in_their_mode():
    model = build(dataclasses.replace(CONFIG, router="noisy_top_k"))
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.noise_weight.normal_()
    noisy = model.train()
    noisy.blocks[0].eval()  # frozen, say
    modes = [module.training for module in noisy.modules()]
    text = generate(noisy, PROMPT, 6)
    assert [module.training for module in noisy.modules()] == modes
    assert torch.equal(text, generate(model.eval(), PROMPT, 6))


def test_a_model_that_fails_in_a_step_stays_in_its_mode():
    model = build().train()
    with pytest.raises(ValueError, match="token 77 is not one of vocab_size=50"):
        generate(model, torch.full((1, 2), 77), 3)
    assert all(module.training for module in model.modules())


def test_expert_choice_is_refused_with_the_reason():
    model = build(dataclasses.replace(CONFIG, router="expert_choice"))
    with pytest.raises(ValueError, match="ExpertChoiceRouter is not causal: which experts"):
        generate(model, PROMPT, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0 is not more than 0 and at most 1"),
        ({"prompt": PROMPT[:, :0]}, "the prompt is empty"),
        ({"prompt": PROMPT[:0]}, "the prompt is empty"),
        (
            {"prompt": "text"},
            r"prompt='text' is a str: token ids are wanted, a tensor of integers \[",
        ),
        ({"prompt": "text"}, "Encode text with a tokenizer first"),
        ({"prompt": "long " * 99}, r"prompt='long long .{,20}' is a str"),
        ({"prompt": [[3, 1]]}, r"prompt=\[\[3, 1\]\] is a list: token ids are wanted"),
        (
            {"prompt": PROMPT[0]},
            r"prompt holds torch.int64 with shape \[4\]: .* prompt\[None\] makes",
        ),
        ({"prompt": PROMPT.float()}, "prompt holds torch.float32 with .* a tensor of integers"),
        ({"length": 5.0}, "length=5.0 is a float: give an int, 1 or more"),
        ({"length": "5"}, "length='5' is a str: give an int"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_arguments_are_refused_by_name_at_once(options, message):
    arguments = {"prompt": PROMPT, "length": 3} | options
    for function in (generate, stream):
        with pytest.raises(ValueError, match=message):
            function(build(), **arguments)
