"""torch.compile with its default settings gives what the layer gives, shape after shape.

In an interpreter of its own: the run-time checks of shapes in this suite are not to be compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMPILED = """
import sys
import torch
from moe_ref import Experts, MoELayer, TopKRouter, quantise
torch.set_num_threads(1)
backend, dtype, compiler = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[4]
torch.manual_seed(0)
quantised = backend == "quantised"
experts = Experts(3, 8, 8, bias=True, backend="loop" if quantised else backend)
experts = quantise.quantise(experts) if quantised else experts
layer = MoELayer(TopKRouter(8, 3, 2), experts).to(dtype)
compiled = torch.compile(layer, backend=compiler)
for shape in ((2, 10, 8), (3, 7, 8)):
    mask = torch.arange(shape[0] * shape[1]).view(shape[:2]) % 5 > 0
    results = []
    for forward in (compiled, layer):
        x = torch.linspace(-1, 1, 8 * shape[0] * shape[1]).reshape(shape).mul(9).sin()
        x = x.to(dtype).requires_grad_()
        y, routing = forward(x, mask=mask)
        (y * torch.arange(y.numel()).reshape(shape).cos().to(dtype)).sum().backward()
        grads = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y, x.grad, *grads, routing.counts])
        layer.zero_grad()
    for ours, theirs in zip(*results):
        scale = theirs.abs().max().clamp(min=1e-2)
        assert (ours - theirs).abs().max() <= scale * float(sys.argv[3])
torch._dynamo.reset()
breaks = torch._dynamo.explain(layer)(x).break_reasons
print(sorted({reason.user_stack[-1].name for reason in breaks}))
"""


def run(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "rounding", "breaks", "compiler"),
    [
        ("loop", "float32", 1e-5, ["sizes_of"], "inductor"),
        ("padded", "float32", 1e-5, ["sizes_of"], "aot_eager"),  # the same graphs but the last
        ("grouped", "bfloat16", 0.02, [], "inductor"),
        ("quantised", "float32", 1e-5, ["sizes_of", "uncompiled"], "aot_eager"),
    ],
)
def test_two_shapes_agree_forward_and_backward_and_only_reading_counts_or_codes_breaks_the_graph(
    backend, dtype, rounding, breaks, compiler, tmp_path
):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = run(COMPILED, backend, dtype, str(rounding), compiler, **cache)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == f"{breaks}\n"


GENERATED = """
import torch
from moe_ref import Transformer, TransformerConfig
from moe_ref.generation import generate
torch.set_num_threads(1)
torch.manual_seed(0)
model = Transformer(TransformerConfig(50, 16, 1, 4, 12, n_experts=4, k=2)).eval()
compiled = torch.compile(model, backend="eager")
options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
for prompt in (torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), [[3, 1, 4], [1]]):
    ours = generate(compiled, prompt, 6, **options)
    for one, other in zip(ours, generate(model, prompt, 6, **options), strict=True):
        assert torch.equal(one, other)
print("equal")
"""


def test_a_compiled_model_generates_the_same_text():
    """The graph alone, without inductor: it grows token by token, and with it the cache."""
    ran = run(GENERATED)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == "equal\n"
