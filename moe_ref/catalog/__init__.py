"""The published Mixture-of-Experts models: what their sources say, counted and made buildable.

    catalog.MODELS["qwen3-30b-a3b"].total       # from arithmetic; .published_total is what was said
    catalog.MODELS["glam-64b-64e"].config(shrink=100, exact=False)     # small enough to train
    catalog.table()                             # all of them, a row each

Every value has a row in `data/models.csv` that says where it comes from.
"""

from collections.abc import Mapping
from typing import Any

from .._data import data_file
from .._validate import Named
from .model import Model, Source
from .reading import read

__all__ = ["MODELS", "Model", "Source", "table"]

MODELS: Mapping[str, Model] = Named("model", read(data_file("models.csv")))


def table() -> Any:
    """A pandas table of all models, a row each, by date.

    Parameters are in billions; `share` is active / total, `width` an expert's d_ff / d_model,
    `said_total` and `said_active` the published figures.

    Raises:
        ModuleNotFoundError: without pandas.

    Example:
        >>> table().loc["mixtral-8x7b", ["total", "said_total", "active", "share"]].to_dict()
        {'total': 46.7, 'said_total': 46.7, 'active': 12.88, 'share': 0.2758}
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'catalog.table() needs pandas: pip install "moe_ref[course]"', name="pandas"
        ) from error
    return pandas.DataFrame([_row(m) for m in MODELS.values()]).set_index("model")


def _row(m: Model) -> dict[str, Any]:
    said = m.published_active
    return {
        "model": m.name,
        "organisation": m.organisation,
        "released": m.released,
        "total": round(m.total / 1e9, 2),
        "said_total": m.published_total / 1e9,
        "active": round(m.active / 1e9, 2),
        "said_active": None if said is None else said / 1e9,
        "share": round(m.active / m.total, 4),
        "layers": m.n_layers + m.n_encoder_layers,
        "moe_layers": sum(n > 0 for n in m.experts) * (2 if m.n_encoder_layers else 1),
        "d_model": m.d_model,
        "experts": m.n_experts,
        "k": m.k,
        "width": round(m.d_ff / m.d_model, 2),
        "shared": round(m.d_shared / m.d_ff, 2),
        "score": m.score,
        "balance": m.balance,
        "attention": m.attention,
    }
