"""One published model: what its sources say, what follows by counting, and how to build it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..config import TransformerConfig
from ..cost import Parameters, Part, parameters
from ..rotary import Yarn
from .building import config_of, lacking
from .counting import parts_of


@dataclass(frozen=True)
class Source:
    """Where a value comes from.

    Attributes:
        kind: "configuration": a file that the model was released with; "paper": a paper, report or
            model card by its authors; "secondary": somebody else, or inferred.
        words: which document, and where in it.

    Example:
        >>> print(Source("paper", "arXiv 2401.04088, table 1"))
        arXiv 2401.04088, table 1 (paper)
    """

    kind: str
    words: str

    def __str__(self) -> str:
        return f"{self.words} ({self.kind})"


@dataclass(frozen=True, repr=False)
class Model:
    """A published model; sizes are those of `TransformerConfig`, if they have the same name.

    Args:
        name: lower case, with hyphens.
        organisation: who made it.
        released: year and month.
        paper: arXiv number, or the title of another document.
        vocab_size, d_model, n_layers, n_heads, d_head: sizes.
        experts: of each block, 0 for a dense one; the encoder has the same.
        k: experts that serve a token.
        d_ff: hidden features of an expert.
        activation: of the experts.
        balance: what keeps the experts busy.
        published_total, published_active: parameters, as its authors say; None: they don't.
        n_encoder_layers: blocks of an encoder, whose outputs the others see; 0: none.
        n_kv_heads, qk_norm, qkv_bias, out_bias, sinks, windows, attention_scale, rope_theta, yarn:
            grouped attention.
        attention: "grouped", "latent" (DeepSeek-V2's), "lightning" (MiniMax's), "delta" (a gated
            delta rule) or "lstm".
        full_every: the last of so many blocks has grouped attention, whatever the others have.
        q_rank, kv_rank, d_rope, d_value: latent attention: ranks, 0 for none, features of a head
            that are rotated (d_head are not), and of a value.
        index_heads, d_index: heads that choose what latent attention sees; 0: it sees all keys.
        linear_key_heads, linear_value_heads, d_linear, convolution: heads of a delta rule, their
            features, and the tokens that its convolution spans.
        attention_gate: whether the heads' output has a learned gate of the same size.
        d_dense: hidden features of dense blocks; None: there are none.
        dense_activation: of dense and shared blocks; None: the experts'.
        bias: whether the projections of feed-forward parts add one.
        d_shared: hidden features of shared experts together.
        shared_mix: how they join.
        router: a name in `routers.ROUTERS`.
        score, renormalize, scale, n_groups, groups_kept, selection_bias, logit_bias: as in
            `TopKRouter`; the groups of a noisy router are the first level of two.
        norm, norm_bias, norm_eps, norms_per_block: "rms" or "layer", and how many.
        positions: learned positions.
        tied, head_bias: the head.
        embedding_scale, residual_scale, logits_divisor: factors.
        other_lacks: what `Transformer` lacks and no field above says.
        note: what to know about the figures.
        sources: of each field that has a value of its own.

    Example:
        >>> from moe_ref.catalog import MODELS
        >>> model = MODELS["mixtral-8x7b"]
        >>> f"{model.total / 1e9:.2f}B, {model.active / 1e9:.2f}B active"
        '46.70B, 12.88B active'
        >>> print(model.sources["d_ff"])
        config.json of mistralai/Mixtral-8x7B-v0.1 (configuration)
    """

    name: str
    organisation: str
    released: str
    paper: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_head: int
    experts: tuple[int, ...]
    k: int
    d_ff: int
    activation: str
    balance: str
    published_total: float
    published_active: float | None = None
    n_encoder_layers: int = 0
    n_kv_heads: int | None = None
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    windows: tuple[int | None, ...] = (None,)
    attention_scale: float | None = None
    rope_theta: float = 10_000.0
    yarn: Yarn | None = None
    attention: str = "grouped"
    full_every: int | None = None
    q_rank: int = 0
    kv_rank: int = 0
    d_rope: int = 0
    d_value: int = 0
    index_heads: int = 0
    d_index: int = 0
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    d_linear: int = 0
    convolution: int = 0
    attention_gate: bool = False
    d_dense: int | None = None
    dense_activation: str | None = None
    bias: bool = False
    d_shared: int = 0
    shared_mix: str | None = None
    router: str = "top_k"
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    n_groups: int = 1
    groups_kept: int = 1
    selection_bias: bool = False
    logit_bias: bool = False
    norm: str = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-5
    norms_per_block: int = 2
    positions: int = 0
    tied: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    other_lacks: tuple[str, ...] = ()
    note: str = ""
    sources: Mapping[str, Source] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.experts) != self.n_layers:
            raise ValueError(
                f"experts of {self.name!r} are those of {len(self.experts)} blocks, not of"
                f" n_layers={self.n_layers}"
            )

    @property
    def n_experts(self) -> int:
        """Experts of the block that has most."""
        return max(self.experts)

    @property
    def lacks(self) -> tuple[str, ...]:
        """What it has and `Transformer` has not."""
        return lacking(self)

    @cached_property
    def _counted(self) -> Parameters:
        return parameters(self)

    @property
    def total(self) -> int:
        """All parameters; what only predicts further tokens or sees images does not count."""
        return self._counted.total

    @property
    def active(self) -> int:
        """Parameters that one token uses, the embedding among them."""
        return self._counted.active

    @property
    def active_without_embeddings(self) -> int:
        """The same without the input embedding."""
        return self._counted.active_without_embeddings

    def parts(self) -> tuple[Part, ...]:
        """What it is made of, for `moe_ref.cost`.

        Of an encoder and a decoder a token is counted to pass through both.

        Example:
            >>> from moe_ref.catalog import MODELS
            >>> [(part.name, part.places) for part in MODELS["deepseek-v3"].parts()][:3]
            [('embedding', 1), ('attention', 61), ('norm', 123)]
        """
        return parts_of(self)

    def __repr__(self) -> str:
        counted = f"{self.total / 1e9:.4g}B parameters, {self.active / 1e9:.3g}B active"
        return f"Model({self.name!r}, {self.organisation} {self.released}: {counted})"

    def config(self, shrink: float = 1.0, *, exact: bool = True) -> TransformerConfig:
        """The configuration that builds it, in its size or smaller.

        Args:
            shrink: widths are divided by it, the vocabulary too, down to 256, the number of blocks
                down to three of each rhythm of dense and MoE blocks, and the number of experts
                down to 256. Numbers that are below stay. How many experts a token visits stays.
            exact: whether a model that `Transformer` can't build is refused; False: the nearest
                decoder, to learn from.

        Raises:
            ValueError: if shrink is below 1, or exact and something is lacking: it says what.

        Example:
            >>> from moe_ref.catalog import MODELS
            >>> small = MODELS["glam-64b-64e"].config(shrink=100, exact=False)
            >>> small.d_model, small.n_experts, small.activation
            (80, (0, 64, 0, 64, 0, 64), 'geglu')
        """
        if not shrink >= 1:
            raise ValueError(f"shrink={shrink} must be 1 or more")
        if exact and self.lacks:
            raise ValueError(
                f"exact=True can't be: of {self.name} Transformer lacks {', '.join(self.lacks)};"
                " exact=False gives the nearest model"
            )
        return config_of(self, shrink)
