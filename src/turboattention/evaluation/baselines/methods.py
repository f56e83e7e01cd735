"""The methods by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from zlib import crc32

from ...config import TurboConfig
from ...errors import InputError
from .compander import Compander
from .gear import GearL
from .interface import CacheMethod
from .kinds import FittedMethod, HubMethod, OwnCache, QuantizerMethod, TurboMethod
from .kivi import KiviKeys, KiviValues
from .kvarn import KVarN
from .oscar import quantizers
from .per_token import PerToken
from .q4_0 import RotatedQ40
from .saw_int4 import RotatedPerToken
from .turboquant import TurboQuantMse

if TYPE_CHECKING:
    from ...calibration import Calibration

CALIBRATED = "turbo-calibrated"

_KIVI = "Liu et al., KIVI, arXiv 2402.02750, section 3 and algorithm 1"
_GEAR = "Kang et al., GEAR, arXiv 2403.05527, section 4; settings of its published runs"
_TURBOQUANT = "Zandieh et al., TurboQuant, arXiv 2504.19874, algorithm 1"
_SAW = "Jia et al., SAW-INT4, arXiv 2604.19157"
_KVARN = "Mueller et al., KVarN, arXiv 2606.03458, and its published reference"


def _baselines() -> list[CacheMethod]:
    per_token = "asymmetric, one scale and min per token and head"
    kivi = "keys per channel, values per token, groups of 32, residual 128"
    return [
        *(
            QuantizerMethod(f"int{bits}", f"INT{bits} per token", "min-max", per_token, PerToken(bits), PerToken(bits))
            for bits in (8, 4)
        ),
        *(
            QuantizerMethod(f"kivi-{bits}", f"KIVI-{bits}", _KIVI, kivi, KiviKeys(bits), KiviValues(bits))
            for bits in (4, 2)
        ),
        QuantizerMethod(
            "gear-l-4",
            "GEAR-L 4",
            _GEAR,
            "KCVT backbone, rank 4 for the prompt, then 2, buffer 64",
            GearL("channel", 4),
            GearL("token", 4),
        ),
        QuantizerMethod(
            "gear-l-2",
            "GEAR-L 2",
            _GEAR,
            "KIVI backbone with groups of 64, rank 4 for the prompt, then 2, buffer 64",
            GearL("channel", 2, group=64),
            GearL("token", 2, group=64),
        ),
        *(
            QuantizerMethod(
                f"turboquant-{bits}",
                f"TurboQuant-MSE {bits}",
                _TURBOQUANT,
                "random rotation, Lloyd-Max codebook, one norm per token and head",
                TurboQuantMse(bits),
                TurboQuantMse(bits),
            )
            for bits in (4, 3)
        ),
        QuantizerMethod(
            "saw-int4",
            "SAW-INT4",
            _SAW,
            "keys rotated in Hadamard blocks of up to 128; asymmetric INT4 per token and head",
            RotatedPerToken(),
            PerToken(4),
        ),
        QuantizerMethod(
            "saw-int4-kv",
            "SAW-INT4, K and V rotated",
            _SAW,
            "keys and values rotated in Hadamard blocks of up to 128; asymmetric INT4 per token and head",
            RotatedPerToken(),
            RotatedPerToken(),
        ),
        QuantizerMethod(
            "q4_0-hadamard",
            "Q4_0, Hadamard",
            "ik_llama.cpp, -ctk q4_0 -ctv q4_0 -khad -vhad",
            "keys and values rotated, blocks of 32 with one float16 scale",
            RotatedQ40(),
            RotatedQ40(),
        ),
        *(
            QuantizerMethod(
                f"compander-{bits}",
                f"Compander {bits}",
                "ExLlamaV3, quantized cache",
                "rotated in Hadamard blocks of 32, divided by their largest magnitude, cubic Lloyd-Max compander",
                Compander(bits),
                Compander(bits),
            )
            for bits in (4, 3, 2)
        ),
        QuantizerMethod(
            "kvarn-k4v2",
            "KVarN K4V2",
            _KVARN,
            "tiles of 128, keys per channel at 4 bits, values per token at 2, first 128 tokens FP16",
            KVarN("channel", 4),
            KVarN("token", 2),
        ),
        FittedMethod(
            "oscar-2",
            "OSCAR INT2",
            "Zhou et al., OSCAR, arXiv 2605.17757, and its published code",
            "rotations fitted to the bundled text, clipped at 0.96 and 0.92, first 64 and last 256 tokens FP16",
            quantizers,
        ),
    ]


def _hub() -> list[CacheMethod]:
    return [
        HubMethod("hf-quanto-4", "QuantizedCache quanto 4", "quanto", "optimum.quanto", {"nbits": 4}),
        HubMethod("hf-quanto-2", "QuantizedCache quanto 2", "quanto", "optimum.quanto", {"nbits": 2}),
        HubMethod("hf-hqq-4", "QuantizedCache HQQ 4", "hqq", "hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
        HubMethod("hf-fp8", "QuantizedCache FP8", "fp8", "torch", {}),
    ]


def _turbo() -> list[CacheMethod]:
    paper = "as published: tile scales, running maximum, min-max stage 2"
    default = (
        "smoothing, rotation, token scales, 64 sink tokens at INT8, first 16 queries in floating point, range search, "
        "adaptive guard"
    )
    lag = f"{default}; the last 64 to 127 tokens at INT8"
    reordered = f"{default}; compressed K not rotated, its channels by attention energy in halves of two widths"
    return [
        *(
            TurboMethod(f"turbo-paper-{bits}", f"TurboAttention {bits}, paper", paper, TurboConfig.paper(bits=bits))
            for bits in (4, "mixed", 2)
        ),
        *(
            TurboMethod(f"turbo-{bits}", f"TurboAttention {bits}", default, TurboConfig(bits=bits))
            for bits in (8, 4, 3, "mixed", 2)
        ),
        # With a window of recent tokens, as most of the others have.
        *(
            TurboMethod(f"turbo-{bits}-lag", f"TurboAttention {bits}, lag", lag, TurboConfig(bits=bits, flush_lag=64))
            for bits in (4, 3, 2)
        ),
        *(
            TurboMethod(
                f"turbo-{bits}-reordered",
                f"TurboAttention {bits}, reordered",
                reordered,
                TurboConfig(bits=bits, reorder_k=True),
            )
            for bits in (4, 3, 2)
        ),
    ]


METHODS: dict[str, CacheMethod] = {method.name: method for method in [OwnCache(), *_baselines(), *_hub(), *_turbo()]}
"""Every method by its name, in the order of tables."""


def parse_methods(text: str, calibration: Calibration | None = None) -> list[CacheMethod]:
    """Methods from names separated by commas, in that order, each once; "all" is every one that can run here.

    With a `calibration`, "turbo-calibrated" is TurboAttention with its widths, and "turbo-calibrated-2.5" with widths
    chosen from the same measurements for another average, here 2.5 bits; the first also belongs to "all".

    Raises:
        InputError: no name, one that there is not, or a calibrated one without a calibration.
        ConfigError: an average out of range.
    """
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if names == ["all"]:
        names = [name for name, method in METHODS.items() if method.unavailable() is None]
        names += [CALIBRATED] if calibration is not None else []
    return [_method(name, text, calibration) for name in names or [""]]


def _method(name: str, text: str, calibration: Calibration | None) -> CacheMethod:
    calibrated = re.fullmatch(rf"{CALIBRATED}(-\d+(\.\d+)?)?", name)
    if calibrated is not None:
        if calibration is None:
            raise InputError(f"--methods: {name} needs a calibration (turboattention calibrate), got none")
        budget = calibrated[1]
        return _calibrated(
            name, calibration.rechosen(float(budget[1:]), calibration.strategy) if budget else calibration
        )
    if name not in METHODS:
        raise InputError(
            f"--methods: expected names from {', '.join(METHODS)}, {CALIBRATED}, or all; got {name or text!r}"
        )
    return METHODS[name]


def _calibrated(name: str, calibration: Calibration) -> TurboMethod:
    of = calibration.provenance
    widths = str([bits.tolist() for bits in calibration.head_bits])
    settings = (
        f"widths per head by measured {calibration.strategy}, {calibration.average_bits:.2f} bits on average "
        f"({crc32(widths.encode()):08x}); calibrated on {of.tokens} tokens ({of.text_hash[:8]}); "
        f"{'its' if calibration.means else 'own'} means; otherwise as turbo-mixed"
    )
    title = f"TurboAttention {calibration.budget:g}, calibrated"
    return TurboMethod(name, title, settings, TurboConfig(bits="mixed"), calibration)
