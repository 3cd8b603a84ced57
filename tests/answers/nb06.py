"""Answers to the exercises of notebook 06: the right one, and plausible wrong ones."""

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------------------- balance_loss
def chosen(logits, k):
    return logits.sort(descending=True, stable=True).indices[:, :k]


def shares(logits, k):
    return F.one_hot(chosen(logits, k), logits.shape[1]).float().mean(dim=(0, 1))


def balance_loss(logits, k):
    return logits.shape[1] * (shares(logits, k) * logits.softmax(dim=-1).mean(dim=0)).sum()


def balance_loss_over_the_masked_softmax(logits, k):
    experts = chosen(logits, k)
    kept = torch.full_like(logits, -torch.inf).scatter(1, experts, logits.gather(1, experts))
    return logits.shape[1] * (shares(logits, k) * kept.softmax(dim=-1).mean(dim=0)).sum()


def balance_loss_with_scores_only_where_chosen(logits, k):
    scores, experts = logits.softmax(dim=-1), chosen(logits, k)
    kept = torch.zeros_like(scores).scatter(1, experts, scores.gather(1, experts))
    return logits.shape[1] * (shares(logits, k) * kept.mean(dim=0)).sum()


def balance_loss_detached(logits, k):
    return balance_loss(logits.detach(), k)


def balance_loss_with_a_gradient_for_one_token(logits, k):
    return balance_loss(torch.cat([logits[:1], logits[1:].detach()]), k)


def balance_loss_k_times(logits, k):
    return k * balance_loss(logits, k)


def balance_loss_of_first_choices(logits, k):
    return logits.shape[1] * (shares(logits, 1) * logits.softmax(dim=-1).mean(dim=0)).sum()


def balance_loss_with_ties_to_the_higher_expert(logits, k):
    return balance_loss(logits.flip(1), k)


# ----------------------------------------------------------------------------------- biased_top_k
def biased_top_k(scores, bias, k):
    experts = chosen(scores + bias, k)
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(dim=-1, keepdim=True)


def biased_top_k_with_the_bias_in_the_weights(scores, bias, k):
    experts = chosen(scores + bias, k)
    weights = (scores + bias).gather(1, experts)
    return experts, weights / weights.sum(dim=-1, keepdim=True)


def biased_top_k_that_takes_the_bias_off_again(scores, bias, k):
    experts = chosen(scores + bias, k)
    weights = (scores + bias).gather(1, experts) - bias[experts]
    return experts, weights / weights.sum(dim=-1, keepdim=True)


def biased_top_k_without_the_bias(scores, bias, k):
    return biased_top_k(scores, 0 * bias, k)


def biased_top_k_not_renormalised(scores, bias, k):
    experts = chosen(scores + bias, k)
    return experts, scores.gather(1, experts)


def biased_top_k_in_the_order_of_the_scores(scores, bias, k):
    experts = chosen(scores + bias, k)
    weights, order = scores.gather(1, experts).sort(descending=True, stable=True)
    return experts.gather(1, order), weights / weights.sum(dim=-1, keepdim=True)


def biased_top_k_with_an_unstable_sort(scores, bias, k):
    experts = (scores + bias).topk(k).indices
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(dim=-1, keepdim=True)


# ----------------------------------------------------------------------------------- idle_updates
def idle_updates():
    scores, bias = torch.tensor([0.9, 0.6, 0.5, 0.2]), torch.zeros(4)
    for updates in range(100):
        experts = biased_top_k(scores[None], bias, 2)[0]
        if (experts == 3).any():
            return updates
        demand = torch.bincount(experts.flatten(), minlength=4).float()
        bias = bias + 0.01 * (demand.mean() - demand).sign()
    raise AssertionError("expert 3 is never chosen")


ANSWERS = {
    "balance_loss": (
        balance_loss,
        [
            balance_loss_over_the_masked_softmax,
            balance_loss_with_scores_only_where_chosen,
            balance_loss_detached,
            balance_loss_with_a_gradient_for_one_token,
            balance_loss_k_times,
            balance_loss_of_first_choices,
            balance_loss_with_ties_to_the_higher_expert,
        ],
    ),
    "biased_top_k": (
        biased_top_k,
        [
            biased_top_k_with_the_bias_in_the_weights,
            biased_top_k_that_takes_the_bias_off_again,
            biased_top_k_without_the_bias,
            biased_top_k_not_renormalised,
            biased_top_k_in_the_order_of_the_scores,
            biased_top_k_with_an_unstable_sort,
        ],
    ),
    "idle_updates": (
        idle_updates,
        # As if expert 1 came down to 0.4; as if it stayed at 0.6; as if the best had to be passed.
        [20, 40, 70],
    ),
}
