"""A worker: ONNX Runtime's GroupQueryAttention on the CPU, a graph of that one node.

Each call stores one token and attends to all of them, in place: the buffers of the past are those of the present. The
quantized caches have one scale per channel, which the caller has to know beforehand; here they are those of the data.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort  # pyright: ignore[reportMissingImports]
from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]
from serve import serve

LEVELS = {"int8": 127, "int4": 7}
ELEMENTS = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "int4": TensorProto.UINT8}


class GroupQueryAttention:
    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: str, causal: bool, threads: int):
        heads, queries, head_dim = self._shape = q.shape
        stored = k.shape[1] - queries
        if queries > 1 and (stored or not causal):
            raise ValueError("several queries: expected as many keys, and a causal mask")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        model = _model(heads, k.shape[0], head_dim, kind)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        scales = [np.abs(x).max(axis=1) / LEVELS[kind] if kind in LEVELS else None for x in (k, v)]
        inputs = {
            "q": _flat(q),
            "k": _flat(k[:, stored:]),
            "v": _flat(v[:, stored:]),
            "last": np.array([k.shape[1] - 1], np.int32),
            "total": np.array([k.shape[1]], np.int32),
        }
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if scale is not None:
                inputs[name] = scale.astype(np.float32).reshape(-1)
        # They are bound by address, so they have to live as long as the binding.
        self._inputs = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in inputs.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._caches = []
        for name, x, scale in zip("kv", (k, v), scales, strict=True):
            cache = ort.OrtValue.ortvalue_from_numpy(_cache(x, stored, kind, scale))
            self._binding.bind_ortvalue_input(f"past_{name}", cache)
            self._binding.bind_ortvalue_output(f"present_{name}", cache)
            self._caches.append(cache)
        self._out = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, queries, heads * head_dim), np.float32))
        self._binding.bind_ortvalue_output("out", self._out)
        self.detail = f"onnxruntime {ort.__version__}, one node, {queries} stored per call"

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> np.ndarray:
        self.run()
        heads, queries, head_dim = self._shape
        return self._out.numpy().reshape(queries, heads, head_dim).transpose(1, 0, 2)


def _model(heads: int, kv_heads: int, head_dim: int, kind: str) -> bytes:
    quantized = kind in LEVELS
    plain, stored = TensorProto.FLOAT, ELEMENTS[kind]
    width = head_dim // 2 if kind == "int4" else head_dim
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    # Rotation tables, positions, bias and sinks are optional and absent.
    names += [""] * 5 + ["k_scale", "v_scale"] if quantized else []
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads}
    if quantized:
        attributes["kv_cache_bit_width"] = 8 if kind == "int8" else 4
    extra = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"} if quantized else {}
    outputs = ["out", "present_k", "present_v"]
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **attributes, **extra)
    value = helper.make_tensor_value_info
    inputs = [value("q", plain, [1, "new", heads * head_dim])]
    inputs += [value(name, plain, [1, "new", kv_heads * head_dim]) for name in ("k", "v")]
    inputs += [value(name, stored, [1, kv_heads, "length", width]) for name in ("past_k", "past_v")]
    inputs += [value(name, TensorProto.INT32, [1]) for name in ("last", "total")]
    inputs += [value(name, plain, [kv_heads * head_dim]) for name in names[-2:] if quantized]
    results = [value("out", plain, [1, "new", heads * head_dim])]
    results += [value(name, stored, [1, kv_heads, "length", width]) for name in outputs[1:]]
    graph = helper.make_graph([node], "attention", inputs, results)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8).SerializeToString()


def _flat(x: np.ndarray) -> np.ndarray:
    """[H, L, D] -> [1, L, H * D]."""
    return x.transpose(1, 0, 2).reshape(1, x.shape[1], -1)


def _cache(x: np.ndarray, stored: int, kind: str, scale: np.ndarray | None) -> np.ndarray:
    """[1, Hkv, Lk, D] with the first `stored` tokens, as the operator holds them; the rest is what the calls store."""
    x = x.copy()
    x[:, stored:] = 0
    if scale is None:
        return x[None]
    codes = np.clip(np.rint(x / scale[:, None]), -LEVELS[kind] - 1, LEVELS[kind]).astype(np.int8)
    if kind == "int4":
        shifted = (codes + 8).astype(np.uint8)
        codes = shifted[..., 0::2] | (shifted[..., 1::2] << 4)
    return np.ascontiguousarray(codes[None])


if __name__ == "__main__":
    serve(GroupQueryAttention)
