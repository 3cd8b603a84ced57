import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref import Transformer, TransformerConfig
from moe_ref.generation import generate, scored, stream
from moe_ref.kv_cache import ContiguousCache

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


# ----------------------------------------------------------------------------- alone and in a batch

SEQUENCES = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=7), min_size=1, max_size=5)
SAMPLINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "top_k": st.integers(1, 60),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.05, 0.5]),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
    },
)


def beside_padding(sequences, sides, filler):
    """One tensor and its mask: side 0 has all padding on the left, 1 on the right, else both."""
    width = max(map(len, sequences)) + 1
    tokens = torch.full((len(sequences), width), filler)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (sequence, side) in enumerate(zip(sequences, sides, strict=False)):
        free = width - len(sequence)
        start = (free, 0, free // 2)[side]
        tokens[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = True
    return tokens, mask


@settings(max_examples=30)
@given(st.data(), SEQUENCES, SAMPLINGS)
def test_a_sequence_gets_the_same_tokens_alone_and_in_any_batch(data, sequences, options):
    model, n = build(), len(sequences)
    seeds = data.draw(st.lists(st.integers(-(2**63), 2**64), min_size=n, max_size=n))
    sides = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    stop = data.draw(st.none() | st.lists(st.integers(0, 49), min_size=1, max_size=20))
    options = options | {"stop": stop}
    alone = [
        generate(model, [sequence], 6, seed=seed, **options)[0].tolist()
        for sequence, seed in zip(sequences, seeds, strict=True)
    ]
    together = generate(model, sequences, 6, seed=seeds, **options)
    assert [text.tolist() for text in together] == alone
    order = data.draw(st.permutations(range(n)))
    chosen = [sequences[i] for i in order], [seeds[i] for i in order]
    shuffled = generate(model, chosen[0], 6, seed=chosen[1], **options)
    assert [text.tolist() for text in shuffled] == [alone[i] for i in order]
    tokens, mask = beside_padding(sequences, sides, filler=-100)
    padded = generate(model, tokens, 6, mask=mask, seed=seeds, **options)
    assert torch.equal(padded[:, : tokens.shape[1]], tokens)  # as it was given
    for sequence, text, new in zip(
        sequences, alone, padded[:, tokens.shape[1] :].tolist(), strict=True
    ):
        own = text[len(sequence) :]
        assert new[: len(own)] == own
        assert set(new[len(own) :]) <= {own[-1]}  # after its stop a sequence repeats it


def test_no_penalty_falls_on_a_token_because_it_stands_beside_a_shorter_prompt():
    model = build()
    for likeliest in (0, int(PROMPT[0, 0])):  # what padding might hold, and the longer prompt does
        first = int(generate(model, [[1]], 1)[0][1])
        with torch.no_grad():
            rows = [likeliest, first]
            model.head.weight[rows] = model.head.weight[rows[::-1]]
        for prompts in ([[1]], [PROMPT[0].tolist(), [1]]):
            text = generate(model, prompts, 1, repetition_penalty=1e6)[-1]
            assert text.tolist() == [1, likeliest]


def test_a_text_goes_on_with_the_draws_it_would_have_had():
    """Draws belong to positions: it does not matter in how many calls a text is made."""
    model, options = build(), {"temperature": 1.0, "seed": [3, 4]}
    whole = generate(model, PROMPT, 12, **options)
    half = generate(model, PROMPT, 5, **options)
    assert torch.equal(generate(model, half, 7, **options), whole)


def test_one_seed_continues_equal_prompts_alike_and_a_seed_for_each_does_not():
    model, prompt = build(), PROMPT[:1].expand(4, -1)
    alike = generate(model, prompt, 12, temperature=1.0, seed=5)
    assert (alike == alike[:1]).all()
    assert len(generate(model, prompt, 12, temperature=1.0, seed=range(4)).unique(dim=0)) == 4


def test_lists_of_tensors_and_of_numbers_are_the_same_prompt():
    model = build()
    numbers = generate(model, [[3, 1, 4], (1, 5)], 4)
    tensors = generate(model, [torch.tensor([3, 1, 4]), torch.tensor([1, 5])], 4)
    assert [text.tolist() for text in numbers] == [text.tolist() for text in tensors]


# --------------------------------------------------------------------------------- stops and caches


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


def test_a_model_that_fails_in_a_step_stays_in_its_mode_and_serves_on():
    model = build().train()
    expected = generate(model, PROMPT, 4)
    calls = []

    def fail_at_the_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    hook = model.register_forward_hook(fail_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, PROMPT, 4)
    assert all(module.training for module in model.modules())
    hook.remove()
    assert torch.equal(generate(model, PROMPT, 4), expected)


def test_expert_choice_is_refused_with_the_reason():
    model = build(dataclasses.replace(CONFIG, router="expert_choice"))
    with pytest.raises(ValueError, match="ExpertChoiceRouter is not causal: which experts"):
        generate(model, PROMPT, 1)


def test_any_of_several_stops_ends_a_sequence_and_each_at_its_own():
    model = build()
    free = generate(model, PROMPT, 8)[:, 4:].tolist()
    stops = [free[0][1], free[1][3]]
    ends = [min(row.index(stop) for stop in stops if stop in row) + 1 for row in free]
    texts = generate(model, PROMPT.tolist(), 8, stop=stops)
    assert [text[4:].tolist() for text in texts] == [
        row[:end] for row, end in zip(free, ends, strict=True)
    ]
    assert len(list(stream(model, PROMPT, 8, stop=stops))) == max(ends)


def test_no_stops_at_all_are_as_good_as_none():
    model = build()
    for prompt in (PROMPT, PROMPT.tolist()):
        for one, other in zip(
            generate(model, prompt, 3, stop=[]), generate(model, prompt, 3), strict=True
        ):
            assert torch.equal(one, other)


def test_a_cache_of_ones_own_goes_on_with_what_it_holds():
    model = build().eval()
    cache = ContiguousCache(model.config, batch=2, length=11)
    whole = generate(model, PROMPT, 8)
    model(PROMPT[:, :2], cache=cache)
    first = generate(model, PROMPT[:, 2:], 3, cache=cache)
    assert torch.equal(first[:, 2:], whole[:, 4:7])
    assert cache.lengths.tolist() == [6, 6]  # all but the last new token
    assert torch.equal(generate(model, whole[:, 6:7], 5, cache=cache)[:, 1:], whole[:, 7:])


def test_sampled_draws_count_what_the_cache_holds():
    model = build().eval()
    whole = generate(model, PROMPT, 8, temperature=1.0)
    cache = ContiguousCache(model.config, batch=2, length=20)
    model(PROMPT[:, :3], cache=cache)
    rest = generate(model, PROMPT[:, 3:], 8, temperature=1.0, cache=cache)
    assert torch.equal(rest, whole[:, 3:])


def test_a_cache_without_room_is_refused_before_it_is_touched_and_serves_afterwards():
    model = build().eval()
    cache = ContiguousCache(model.config, batch=2, length=8)
    with pytest.raises(ValueError, match="room for length=8 tokens, not 9: 4 up to the end of"):
        generate(model, PROMPT, 6, cache=cache)
    other = ContiguousCache(model.config, batch=3, length=8)
    with pytest.raises(ValueError, match="made for batch=3, not batch=2"):
        generate(model, PROMPT, 1, cache=other)
    assert cache.lengths.tolist() == [0, 0]
    assert torch.equal(generate(model, PROMPT, 5, cache=cache), generate(model, PROMPT, 5))


# -------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 7, "seed": 3}])
def test_log_probabilities_are_those_of_the_uncached_model_before_any_filter(options):
    model = build().eval()
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]
    made = scored(model, prompts, 7, **options)
    texts = generate(model, prompts, 7, **options)
    for prompt, text, tokens, scores in zip(
        prompts, texts, made.tokens, made.log_probs, strict=True
    ):
        assert text.tolist() == prompt + tokens.tolist()
        logits = model(text[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=0)


def test_log_probabilities_end_with_the_stop():
    model = build()
    stop = int(generate(model, PROMPT, 6)[0, 6])
    made = scored(model, PROMPT, 6, stop=stop)
    assert made.tokens[0].tolist()[-1] == stop
    assert [len(scores) for scores in made.log_probs] == [len(tokens) for tokens in made.tokens]
    assert stop not in made.tokens[0][:-1].tolist() + made.tokens[1][:-1].tolist()


# ----------------------------------------------------------------------------------- modes of torch


def test_inference_mode_may_come_and_go_between_the_tokens():
    model = build()
    options = {"temperature": 1.0, "repetition_penalty": 1.3, "stop": 49}
    expected = generate(model, PROMPT, 6, **options)
    with torch.inference_mode():
        assert torch.equal(generate(model, PROMPT, 6, **options), expected)
    for start in (True, False):
        with torch.inference_mode(start):
            flow, new = stream(model, PROMPT, 6, **options), []
        for step in range(expected.shape[1] - 4):
            with torch.inference_mode((step % 2 == 0) == start):
                new.append(next(flow))
        assert torch.equal(torch.stack(new, dim=1), expected[:, 4:])


def test_a_caller_may_train_between_two_tokens():
    model = build().train()
    for new in stream(model, PROMPT, 3):
        assert model.training and torch.is_grad_enabled()
        model(new[:, None]).logits.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_generate_alone_as_in_a_batch(dtype):
    model = build().to(dtype)
    texts = generate(model, [[3, 1, 4], [1]], 5, temperature=1.0, top_p=0.9)
    assert [len(text) for text in texts] == [8, 6]
    scores = scored(model, [[3, 1, 4]], 5).log_probs[0]
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_int32_prompts_and_greedy_ties_take_the_lower_id():
    model = build()
    with torch.no_grad():
        model.head.weight.zero_()
    text = generate(model, PROMPT.int(), 3)
    assert text[:, 4:].tolist() == [[0, 0, 0]] * 2


# ---------------------------------------------------------------------------------------- bad input

HALF = torch.tensor([[True, True, False, False], [False] * 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0 must be at least 1"),
        ({"length": 5.0}, "length=5.0 is a float: give an int, 1 or more"),
        ({"length": "5"}, "length='5' is a str: give an int"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 .the likeliest token. or a number"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"seed": [1, 2, 3]}, "seed: 3 for 2 sequences; give one, or one each"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number, or a list of them"),
        ({"seed": [0.5, 1]}, r"seed=\[0.5, 1\] must be a whole number, or a list of them"),
        ({"stop": 50}, "stop=50 is not one of vocab_size=50"),
        ({"stop": [3, -1]}, "stop=-1 is not one of vocab_size=50"),
        ({"stop": "end"}, "stop='end' must be a whole number, or a list of them"),
        ({"prompt": PROMPT[:, :0]}, "the prompt is empty: give at least one token"),
        ({"prompt": PROMPT[:0]}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [[3], []]}, r"prompt\[1\] is empty: give at least one token"),
        ({"prompt": PROMPT, "mask": HALF}, r"prompt\[1\] is empty"),
        ({"prompt": PROMPT, "mask": HALF[:, :2]}, r"mask: shape \[2, 2\], .* asks for \[2, 4\]"),
        ({"prompt": PROMPT, "mask": PROMPT}, "mask: .* torch.int64; .* torch.bool"),
        ({"prompt": [[3], [4]], "mask": HALF}, "mask is for a prompt in one tensor"),
        ({"prompt": PROMPT + 48}, "prompt: token 57 is not one of vocab_size=50"),
        ({"prompt": [[3], [-1]]}, "prompt: token -1 is not one of vocab_size=50"),
        (
            {"prompt": "text"},
            r"prompt='text' is a str: token ids are wanted, a tensor of integers \[",
        ),
        ({"prompt": "text"}, "Encode text with a tokenizer first"),
        ({"prompt": "long " * 99}, r"prompt='long long .{,20}' is a str"),
        ({"prompt": [3, 1]}, r"prompt\[0\]=3 is a int: token ids are wanted"),
        ({"prompt": ["text"]}, r"prompt\[0\]='text' is a str: token ids are wanted"),
        ({"prompt": [[3, 1.5]]}, r"prompt\[0\]=\[3, 1.5\] is a list: token ids are wanted"),
        ({"prompt": [PROMPT]}, r"prompt\[0\] holds torch.int64 with shape \[2, 4\]: token ids"),
        (
            {"prompt": PROMPT[0]},
            r"prompt holds torch.int64 with shape \[4\]: .* prompt\[None\] makes",
        ),
        ({"prompt": PROMPT.float()}, "prompt holds torch.float32 with .* a tensor of integers"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_arguments_are_refused_by_name_at_once_and_the_model_serves_on(options, message):
    model = build()
    arguments = {"prompt": PROMPT, "length": 3} | options
    for function in (generate, stream, scored):
        with pytest.raises(ValueError, match=message):
            function(model, **arguments)
    assert model.training
    assert generate(model, PROMPT, 3).shape == (2, 7)
