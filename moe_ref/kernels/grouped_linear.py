"""The loop's linear map: one product for each expert, with a backward of its own."""

from typing import Any

import torch
from torch import Tensor

from .cpu import linear


class GroupedLinear(torch.autograd.Function):
    """The rows of expert e times weight[e].T, plus bias[e], for every e in order.

    Autograd, left to itself, would make the gradients of the weights one by one and then stack
    them, which takes their memory twice. This backward can itself be differentiated.
    """

    @staticmethod
    def forward(rows, sizes, weight, bias):  # type: ignore[no-untyped-def]
        y = rows.new_empty(len(rows), weight.shape[1])
        for e, (run, place) in enumerate(zip(rows.split(sizes), y.split(sizes), strict=True)):
            if sizes[e]:
                place.copy_(linear(run, weight[e], of(bias, e)))
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        rows, ctx.sizes, weight, bias = inputs
        ctx.save_for_backward(rows, weight, bias)
        ctx.save_for_forward(rows, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, weight, bias = ctx.saved_tensors
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = GroupedLinear.apply(grad, ctx.sizes, weight.mT, None)
        if ctx.needs_input_grad[2]:
            grad_weight = GroupedWeightGrad.apply(grad, ctx.sizes, rows, weight.dtype)
        if ctx.needs_input_grad[3]:
            sums = [run.sum(dim=0) for run in grad.split(ctx.sizes)]
            grad_bias = torch.stack(sums).to(bias.dtype)
        return grad_rows, None, grad_weight, grad_bias

    @staticmethod
    def jvp(ctx, d_rows, _, d_weight, d_bias):  # type: ignore[no-untyped-def]
        rows, weight, _ = ctx.saved_tensors
        parts = []
        if d_rows is not None:
            parts.append(GroupedLinear.apply(d_rows, ctx.sizes, weight, None))
        if d_weight is not None:
            parts.append(GroupedLinear.apply(rows, ctx.sizes, d_weight, None))
        if d_bias is not None:
            sizes = torch.tensor(ctx.sizes, device=d_bias.device)
            parts.append(d_bias.to(rows.dtype).repeat_interleave(sizes, dim=0))
        return sum(parts)


class GroupedWeightGrad(torch.autograd.Function):
    """left[rows of e].T @ right[rows of e] for every e: the gradient of the weights."""

    @staticmethod
    def forward(left, sizes, right, dtype):  # type: ignore[no-untyped-def]
        shape = len(sizes), left.shape[1], right.shape[1]
        products = torch.empty(shape, dtype=dtype, device=left.device)
        for place, a, b in zip(products, left.split(sizes), right.split(sizes), strict=True):
            if a.dtype == dtype:
                torch.mm(a.T, b, out=place)
            else:
                place.copy_(a.T @ b)
        return products

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        left, ctx.sizes, right, _ = inputs
        ctx.save_for_backward(left, right)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        left, right = ctx.saved_tensors
        grad_left = GroupedLinear.apply(right, ctx.sizes, grad, None)
        return grad_left, None, GroupedLinear.apply(left, ctx.sizes, grad.mT, None), None


def of(stacked: Tensor | None, e: int) -> Any:
    """Expert e's part of a stacked bias, if there is one."""
    return None if stacked is None else stacked[e]
