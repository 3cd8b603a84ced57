import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ref import Capacity, TopKRouter, Transformer, TransformerConfig
from moe_ref.telemetry import RoutingStats, Tally, Trace

from .tools import sizes

KINDS = ["chat", "code", "translation"]


def routed(shape, seed, overflow=None):
    """A routing with padding and, if asked for, scarce places; and the kind of every token."""
    tokens, n_experts, k = shape
    torch.manual_seed(seed)
    x, mask = torch.randn(tokens, 4) + torch.randn(4), torch.rand(tokens) < 0.8
    routing = TopKRouter(4, n_experts, k)(x, mask=mask)
    if overflow:
        routing = Capacity(0.6, overflow=overflow)(routing)
    return routing, [KINDS[i] for i in torch.randint(3, (tokens,)).tolist()]


def counted(pairs):
    """What the tally of these (routing, chosen tokens) should be, slot by slot."""
    n_experts = pairs[0][0].n_experts
    tokens, nats = 0, 0.0
    demand, served, overflow = ([0] * (n_experts + 1) for _ in range(3))
    for routing, chosen in pairs:
        for t in chosen:
            if not routing.mask[t]:
                continue
            tokens += 1
            nats -= sum(p * math.log(p) for p in routing.scores[t].tolist() if p > 0)
            asked, given = routing.asked[t].tolist(), routing.experts[t].tolist()
            for a, g in zip(asked, given):
                demand[a] += 1
                served[g] += 1
                overflow[a] += a != g
    return tokens, demand[:-1], served[:-1], overflow[:-1], pytest.approx(nats, rel=1e-6, abs=1e-9)


def figures(tally: Tally):
    return (
        tally.tokens,
        tally.demand.tolist(),
        tally.served.tolist(),
        tally.overflow.tolist(),
        tally.nats,
    )


def same(ours: RoutingStats, theirs: RoutingStats):
    assert ours.by_label.keys() == theirs.by_label.keys()
    pairs = [(ours.overall, theirs.overall)]
    pairs += [(ours.by_label[label], theirs.by_label[label]) for label in theirs.by_label]
    for mine, other in pairs:
        *exact, nats = figures(other)
        assert figures(mine) == (*exact, pytest.approx(nats))


many = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 99)), min_size=1, max_size=4)
rules = st.sampled_from([None, "drop", "reroute"])


@given(many, sizes(), rules)
def test_batches_add_up_to_a_count_by_hand_overall_and_by_label(batches, shape, overflow):
    _, n_experts, k = shape
    stats = RoutingStats(n_experts)
    seen = []
    for tokens, seed in batches:
        routing, labels = routed((tokens, n_experts, k), seed, overflow)
        stats.update(routing, labels)
        seen.append((routing, labels))
    everyone = [(routing, range(len(labels))) for routing, labels in seen]
    assert figures(stats.overall) == counted(everyone)
    for label, tally in stats.by_label.items():
        chosen = [
            (routing, [t for t, name in enumerate(labels) if name == label])
            for routing, labels in seen
        ]
        assert figures(tally) == counted(chosen)
    assert stats.by_label.keys() == {name for _, labels in seen for name in labels}


@given(many, many, sizes(), st.booleans())
def test_merging_two_equals_one_over_both(first, second, shape, labelled):
    _, n_experts, k = shape
    parts = []
    whole = RoutingStats(n_experts)
    for batches in (first, second):
        stats = RoutingStats(n_experts)
        for tokens, seed in batches:
            routing, labels = routed((tokens, n_experts, k), seed, "drop")
            for target in (stats, whole):
                target.update(routing, labels if labelled else None)
        parts.append(stats)
    before = figures(parts[0].overall)
    merged = parts[0].merge(parts[1])
    same(merged, whole)
    same(parts[1].merge(parts[0]), whole)
    assert figures(parts[0].overall) == before
    same(parts[0].merge(RoutingStats(n_experts)), parts[0])


@given(sizes(), st.integers(0, 99), st.sampled_from(["drop", "reroute"]))
def test_labels_sum_to_the_whole_under_capacity(shape, seed, overflow):
    routing, labels = routed(shape, seed, overflow)
    stats = RoutingStats(shape[1])
    stats.update(routing, labels)
    for name in ("tokens", "demand", "served", "overflow"):
        total = sum(getattr(tally, name) for tally in stats.by_label.values())
        if labels:
            assert torch.as_tensor(total == getattr(stats.overall, name)).all()
    tallies = stats.by_label.values()
    dropped = sum(t.dropped_fraction * int(t.demand.sum()) for t in tallies)
    whole = stats.overall.dropped_fraction * int(stats.overall.demand.sum())
    assert dropped == pytest.approx(whole)
    assert stats.overall.dropped_fraction == pytest.approx(routing.dropped_fraction.item())


@given(sizes(), st.integers(0, 99))
def test_under_drop_the_overflow_is_that_of_the_routing(shape, seed):
    routing, _ = routed(shape, seed, "drop")
    stats = RoutingStats(shape[1])
    stats.update(routing)
    assert stats.overall.overflow.equal(routing.overflow)
    assert stats.overall.demand.equal(routing.demand)
    assert stats.overall.served.equal(routing.counts)


@given(sizes(), st.integers(0, 99))
def test_entropy_lies_between_zero_and_log_n_and_is_that_of_the_routing(shape, seed):
    routing, _ = routed(shape, seed)
    stats = RoutingStats(shape[1])
    stats.update(routing)
    assert 0 <= stats.overall.entropy <= math.log(shape[1]) + 1e-6
    assert stats.overall.entropy == pytest.approx(routing.entropy.item(), abs=1e-5)


def decided(logits, k=1):
    router = TopKRouter(len(logits[0]), len(logits[0]), k)
    torch.nn.init.eye_(router.weight)
    return router(torch.tensor(logits))


def test_entropy_is_log_n_for_equal_scores_and_zero_for_a_certain_router():
    equal, certain = RoutingStats(8), RoutingStats(3)
    equal.update(decided([[0.0] * 8] * 5))
    assert equal.overall.entropy == pytest.approx(math.log(8))
    certain.update(decided([[1e4, 0.0, 0.0]] * 5))
    assert certain.overall.entropy == 0


def test_figures_of_a_small_case_are_those_worked_out_by_hand():
    # Experts 0 and 1 serve 3 and 1 of four tokens, expert 2 none: mean 4/3.
    stats = RoutingStats(3)
    stats.update(decided([[9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0]]))
    assert stats.overall.served.tolist() == [3, 1, 0]
    assert stats.overall.imbalance == pytest.approx(9 / 4)
    deviation = math.sqrt(((3 - 4 / 3) ** 2 + (1 - 4 / 3) ** 2 + (4 / 3) ** 2) / 3)
    assert stats.overall.variation == pytest.approx(deviation / (4 / 3))
    assert stats.overall.dead == 1 and stats.overall.dropped_fraction == 0
    stats.update(decided([[0, 0, 9.0]] * 2))
    assert stats.overall.tokens == 6 and stats.overall.dead == 0


def test_dead_is_who_was_never_asked_even_if_rerouted_tokens_keep_it_busy():
    stats = RoutingStats(2)
    stats.update(Capacity(1.0, overflow="reroute")(decided([[9.0, 0.0]] * 4)))
    assert stats.overall.served.tolist() == [2, 2] and stats.overall.dead == 1
    assert stats.overall.overflow.tolist() == [2, 0]
    assert stats.overall.dropped_fraction == 0
    assert stats.overall.imbalance == 2  # of the demand: one expert of two is asked for all


def test_before_any_token_every_figure_is_finite():
    tally = RoutingStats(4).overall
    assert (tally.tokens, tally.imbalance, tally.variation) == (0, 1.0, 0.0)
    assert (tally.entropy, tally.dropped_fraction, tally.dead) == (0.0, 0.0, 4)
    assert RoutingStats(4).to_frame().loc["all"].notna().all()


def test_the_table_has_a_row_for_each_label_and_a_column_for_each_figure():
    routing, labels = routed((40, 3, 1), 0, "drop")
    stats = RoutingStats(3)
    stats.update(routing, labels)
    table = stats.to_frame()
    assert table.index[0] == "all" and set(table.index[1:]) == set(KINDS)
    assert list(table.columns) == [
        "tokens",
        "dropped",
        "overflow",
        "imbalance",
        "variation",
        "entropy",
        "dead",
        "expert 0",
        "expert 1",
        "expert 2",
    ]
    for label, tally in {"all": stats.overall, **stats.by_label}.items():
        row = table.loc[label]
        assert row["tokens"] == tally.tokens and row["dead"] == tally.dead
        assert row["dropped"] == tally.dropped_fraction and row["entropy"] == tally.entropy
        assert row["imbalance"] == tally.imbalance and row["variation"] == tally.variation
        assert row["overflow"] == tally.overflow.sum()
        assert [row[f"expert {e}"] for e in range(3)] == tally.served.tolist()


def test_nothing_keeps_a_routing_or_its_graph():
    router = TopKRouter(4, 3, 2)
    routing = router(torch.randn(6, 4))
    assert routing.scores.requires_grad
    stats = RoutingStats(3)
    stats.update(routing, ["chat", "code"] * 3)
    for tally in (stats.overall, *stats.by_label.values()):
        for tensor in (tally.demand, tally.served, tally.overflow):
            assert not tensor.requires_grad and tensor.device.type == "cpu"
        assert isinstance(tally.nats, float)
    gone = weakref.ref(routing)
    del routing
    gc.collect()
    assert gone() is None


def test_what_does_not_fit_is_refused_by_name():
    routing, labels = routed((5, 3, 1), 0)
    with pytest.raises(ValueError, match="n_experts=0 must be at least 1"):
        RoutingStats(0)
    stats = RoutingStats(4)
    with pytest.raises(ValueError, match="n_experts=3, but these stats have n_experts=4"):
        stats.update(routing)
    with pytest.raises(ValueError, match="n_experts=3 is not n_experts=4"):
        stats.merge(RoutingStats(3))
    fitting = RoutingStats(3)
    with pytest.raises(ValueError, match="4 labels for 5 tokens"):
        fitting.update(routing, labels[:4])
    assert fitting.overall.tokens == 0 and not fitting.by_label  # half an update is none


def test_a_trace_holds_what_each_layer_served_after_capacity():
    config = TransformerConfig(50, 16, 3, 2, d_ff=8, n_experts=(4, 0, 4), k=2, capacity_factor=0.5)
    routings = Transformer(config)(torch.arange(12)[None]).routings
    trace = Trace()
    trace.add(routings)
    trace.add(routings[:1])
    served = [{e for e in r.experts.flatten().tolist() if e < 4} for r in routings]
    assert [(n, set(experts), guess) for n, experts, guess in trace.events] == [
        (0, served[0], False),
        (1, served[1], False),
        (0, served[0], False),
    ]


def test_popular_experts_come_first_and_guesses_do_not_count():
    trace = Trace()
    for layer, experts in ((0, [1, 2]), (1, [2]), (0, [2]), (1, [0])):
        trace.touched(layer, experts)
        trace.guessed(layer, [3])
    assert trace.popular() == [(0, 2), (0, 1), (1, 0), (1, 2)]


def test_a_guess_is_graded_by_the_layers_next_turn_alone():
    trace = Trace()
    trace.touched(0, [5])  # no guess: not graded
    trace.guessed(1, [1, 2])
    trace.touched(1, [2, 3])  # one of two
    trace.touched(1, [1])  # the guess is used up
    trace.guessed(1, [])
    trace.touched(1, [4, 6])  # none of two
    assert trace.guessed_right == 1 / 4
    assert Trace().guessed_right == 0
