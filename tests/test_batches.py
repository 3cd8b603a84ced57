"""A model's loss on batches: over every graded target, in evaluation, with nothing left changed."""

import pytest
import torch

from moe_ref import batches
from moe_ref.batches import UNGRADED, Batch, held_out_loss
from moe_ref.course import corpora

from .test_training import TEXTS, build, noisy, weights


def test_held_out_loss_is_taken_in_evaluation_and_leaves_weights_and_modes_as_they_are():
    model = noisy()
    model.blocks[0].eval()  # frozen, say
    modes = [module.training for module in model.modules()]
    before, state = weights(model), torch.get_rng_state()
    held_out = list(corpora.sweep(TEXTS, batch=3, seq=16, limit=8))
    ours = held_out_loss(model, held_out)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "noise was drawn"
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    total, count = 0.0, 0
    for batch in held_out:
        shares = model(batch.inputs, mask=batch.mask).logits.log_softmax(dim=-1)
        right = shares.gather(-1, batch.targets[..., None])[..., 0][batch.mask]
        total, count = total - right.sum().item(), count + len(right)
    assert ours == pytest.approx(total / count, rel=1e-6)
    model.train()
    noise = model(held_out[0].inputs, mask=held_out[0].mask).logits
    assert not torch.equal(noise, model.eval()(held_out[0].inputs, mask=held_out[0].mask).logits)


def test_modes_come_back_even_if_an_evaluation_fails():
    model = build()
    with pytest.raises(ValueError, match="token 5000 is not one of vocab_size=2048"):
        held_out_loss(model, [Batch(torch.tensor([[5000]]), torch.tensor([[1]]))])
    assert all(module.training for module in model.modules())


def test_held_out_loss_of_nothing_is_refused():
    nothing = torch.full((1, 4), UNGRADED)
    for held_out in ([], [Batch(torch.ones(1, 4, dtype=torch.long), nothing)]):
        with pytest.raises(ValueError, match="batches hold no target to grade"):
            held_out_loss(build(), held_out)


def test_a_batch_and_what_looks_like_one_can_be_told_from_others():
    ones = torch.ones(2, 3, dtype=torch.long)
    for batch in (Batch(ones, ones), corpora.Batch(ones, ones[:, 0])):
        assert isinstance(batch, batches.BatchLike)
    assert not isinstance((ones, ones), batches.BatchLike)
