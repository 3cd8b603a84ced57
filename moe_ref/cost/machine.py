"""A machine, as far as time and money depend on it: rates, memory, links, price."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from .._validate import Named, check_choice
from . import measuring

# Kernels that a part takes where they are fused as serving engines fuse them.
KERNELS = {"embedding": 1, "norm": 1, "attention": 5, "dense": 3, "shared": 3, "mix": 2}
KERNELS |= {"router": 2, "experts": 3, "head": 1}


@dataclass(frozen=True, repr=False)
class Machine:
    """What a machine can do; all rates are of one device.

    Args:
        name: what to call it.
        flops: FLOP/s of dense matrix products, by dtype; no factor for sparsity.
        bandwidth: bytes/s of reading memory.
        row_bandwidth: the same where each product has one row; None: no other.
        memory: bytes that it holds; infinity: unknown.
        compute_share, memory_share: shares of the two rates that kernels reach; 1 where the rates
            were measured.
        cache: bytes that stay in a cache from pass to pass.
        cache_bandwidth: bytes/s at which a pass reads if all it reads fits there.
        overhead: seconds that a part takes in each place, whatever its size, by its name;
            "expert" is for each expert that is touched, beside "experts" for all.
        elementwise: seconds for each of `Part.numbers` and each token; "expert" for each row.
        link_bandwidth: bytes/s that leave a device for the others; 0: it has no link.
        link_latency: seconds until the first byte is there.
        price: dollars for an hour of one device; None: unknown.
        source: where the figures are from.

    Raises:
        ValueError: if a rate, a size or a share is impossible.

    Example:
        >>> h100 = MACHINES["h100"]
        >>> round(h100.rate("bfloat16") / h100.read_rate(1e9))  # FLOPs for each byte that it reads
        174
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    row_bandwidth: float | None = None
    compute_share: float = 1.0
    memory_share: float = 1.0
    cache: float = 0.0
    cache_bandwidth: float = 0.0
    overhead: Mapping[str, float] = field(default_factory=dict)
    elementwise: Mapping[str, float] = field(default_factory=dict)
    link_bandwidth: float = 0.0
    link_latency: float = 0.0
    price: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        rates = {f"flops[{name!r}]": rate for name, rate in self.flops.items()}
        for name, rate in {**rates, "bandwidth": self.bandwidth, "memory": self.memory}.items():
            if not rate > 0:
                raise ValueError(f"{name}={rate} of {self.name!r} must be more than 0")
        for name in ("compute_share", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not more than 0 and at most 1")

    def __repr__(self) -> str:
        rates = ", ".join(
            f"{rate / 1e12:.4g} TFLOP/s in {name}" for name, rate in self.flops.items()
        )
        return f"Machine({self.name!r}: {rates}; {self.bandwidth / 1e9:.4g} GB/s)"

    def rate(self, dtype: str) -> float:
        """FLOP/s that matrix products of this dtype reach; ValueError if it knows none."""
        check_choice("dtype", dtype, self.flops)
        return self.flops[dtype] * self.compute_share

    def read_rate(self, nbytes: float, rows: float = 1.0) -> float:
        """Bytes/s of weights in a pass that reads so many, in products of so many rows."""
        if 0 < self.cache >= nbytes:
            return self.cache_bandwidth * self.memory_share
        alone = 1 - min(math.log(max(rows, 1.0)) / math.log(measuring.SEVERAL), 1.0)
        gain = (self.row_bandwidth or self.bandwidth) / self.bandwidth
        return self.bandwidth * gain**alone * self.memory_share

    @classmethod
    def measured(cls, device: str = "cpu") -> "Machine":
        """The machine at hand, measured in a few seconds with the threads that torch has now.

        Rates are those of products: large ones for `flops`, float32 of few rows for the bandwidth.
        Overheads are the times of this library's parts, as small as they can be.

        Args:
            device: of torch, "cpu" or "cuda".
        """
        with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
            return cls(**measuring.measure(device))


# Assumed, from no datasheet: 0.85 of the bandwidth, half of the peak and 4 microseconds for each
# kernel were chosen to agree with published times of MoE layers on an H100, in tests/test_cost.py.
# The other GPUs have the same shares by analogy.
_GPU = {
    "overhead": {name: n * 4e-6 for name, n in KERNELS.items()},
    "compute_share": 0.5,
    "memory_share": 0.85,
    "link_latency": 10e-6,
}
_HOPPER = {"float32": 494.7e12, "bfloat16": 989.4e12, "float8": 1978.9e12, "int8": 1978.9e12}
_PRICES = "price: about what specialised GPU clouds asked on demand in early 2026"
_H100 = Machine(
    "H100 SXM",
    flops=_HOPPER,  # float32 stands for TF32
    bandwidth=3.35e12,
    memory=80e9,
    link_bandwidth=450e9,  # NVLink 4: 900 GB/s, both directions together
    price=3.0,
    source=f"NVIDIA H100 datasheet, without sparsity; {_PRICES}",
    **_GPU,  # type: ignore[arg-type]
)

_KNOWN = {
    "h100": _H100,
    "h200": replace(
        _H100,
        name="H200 SXM",
        bandwidth=4.8e12,
        memory=141e9,
        price=4.0,
        source=f"NVIDIA H200 datasheet, without sparsity; {_PRICES}",
    ),
    "h800": replace(
        _H100,
        name="H800 SXM",
        link_bandwidth=50e9,  # InfiniBand between nodes, 400 Gbit/s for each GPU
        price=2.0,
        source="H100's rates; link: DeepSeek-V3 (2412.19437), section 3.1; price: assumed by"
        " DeepSeek, DeepSeek-V3/R1 Inference System Overview, 2025",
    ),
    "b200": replace(
        _H100,
        name="B200, HGX",
        flops={
            "float32": 1.1e15,
            "bfloat16": 2.25e15,
            "float8": 4.5e15,
            "int8": 4.5e15,
            "float4": 9e15,
        },
        bandwidth=8e12,
        memory=180e9,
        link_bandwidth=900e9,  # NVLink 5: 1.8 TB/s, both directions together
        price=5.5,
        source=f"NVIDIA HGX B200 datasheet, 1,000 W, without sparsity; {_PRICES}",
    ),
    "a100": replace(
        _H100,
        name="A100 SXM, 80 GB",
        flops={"float32": 156e12, "bfloat16": 312e12, "int8": 624e12},
        bandwidth=2.039e12,
        link_bandwidth=300e9,  # NVLink 3: 600 GB/s, both directions together
        price=1.8,
        source=f"NVIDIA A100 datasheet, without sparsity; {_PRICES}",
    ),
    "laptop": Machine(
        "laptop, 8 cores of Zen 4",
        # 8 cores * 32 FLOPs a cycle (two AVX2 units that multiply and add) * 3.3 GHz.
        flops={"float32": 0.845e12, "bfloat16": 1.69e12},
        bandwidth=89.6e9,  # two channels of DDR5-5600
        memory=32e9,
        compute_share=0.7,
        memory_share=0.7,
        overhead={name: n * 2e-6 for name, n in KERNELS.items()},
        source="AMD Ryzen 7 7840U at its base clock: arithmetic from its specification",
    ),
}
MACHINES: Mapping[str, Machine] = Named("machine", _KNOWN)
