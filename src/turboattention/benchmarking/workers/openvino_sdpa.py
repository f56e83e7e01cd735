"""A worker: OpenVINO's attention over its own KV cache on the CPU, as a model of one layer.

OpenVINO offers no call over a quantized cache: the CPU plugin makes one of ReadValue, Concat, Assign and
ScaledDotProductAttention. Each call stores one token and attends to all of them. The cache grows by one token per call,
and is reset to its initial length before a sample.
"""

from __future__ import annotations

import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports]
from openvino import opset13 as ops  # pyright: ignore[reportMissingImports]
from openvino.op import assign, read_value  # pyright: ignore[reportMissingImports]
from openvino.op.util import Variable, VariableInfo  # pyright: ignore[reportMissingImports]
from serve import serve

GROWTH = 16
"""The fraction of its tokens by which the cache may grow before it is reset."""

CHUNK = 512
"""Tokens per call while the cache is being filled by calls."""


class Layer:
    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: str, causal: bool, threads: int):
        if q.shape[1] != 1:
            raise ValueError(f"q: expected one query, got {q.shape[1]}")
        core = ov.Core()
        # Its float computations at full precision; only the cache is quantized.
        settings = {"KV_CACHE_PRECISION": kind, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        # Pinned to a core, it would wait for whatever else runs there.
        settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        compiled = core.compile_model(_model(q.shape[0], k.shape[0], q.shape[2]), "CPU", settings)
        self._check(compiled)
        self._request = compiled.create_infer_request()
        self._kind, self._arrays = kind, {"q": q[None], "k": k[None], "v": v[None]}
        self._inputs = self._feed(slice(-1, None))
        self._fill()
        self.detail = f"openvino {ov.__version__}, a model of one layer, 1 stored per call"

    @staticmethod
    def _check(compiled: ov.CompiledModel) -> None:
        kinds = {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}
        if not any("ScaledDotProductAttention" in kind for kind in kinds):
            raise RuntimeError(f"the plugin did not fuse the cache into its attention: {sorted(kinds)}")

    def _feed(self, tokens: slice) -> dict[str, np.ndarray]:
        """Inputs that store these tokens; the plugin takes as many queries as it stores tokens."""
        parts = {name: np.ascontiguousarray(self._arrays[name][:, :, tokens]) for name in "kv"}
        parts["q"] = np.ascontiguousarray(np.repeat(self._arrays["q"], parts["k"].shape[2], axis=2))
        return parts | {"beam": np.zeros(1, np.int32)}

    def _fill(self) -> None:
        """All tokens except the last, whose call is timed."""
        self._new, stored = 0, self._arrays["k"].shape[2] - 1
        if self._kind == "u4":  # setting a state of this precision crashes the plugin: it is filled by calls
            self._request.reset_state()
            for at in range(0, stored, CHUNK):
                self._request.infer(self._feed(slice(at, min(at + CHUNK, stored))), share_inputs=True)
            return
        for state in self._request.query_state():
            past = self._arrays[state.name.removeprefix("past_")][:, :, :stored]
            state.state = ov.Tensor(np.ascontiguousarray(past))

    def prepare(self) -> None:
        if self._new > self._arrays["k"].shape[2] // GROWTH:
            self._fill()

    def run(self) -> None:
        self._new += 1
        self._request.infer(self._inputs, share_inputs=True, share_outputs=True)

    def output(self) -> np.ndarray:
        if self._new:
            self._fill()
        self.run()
        return self._request.get_output_tensor(0).data[0].copy()


def _model(heads: int, kv_heads: int, head_dim: int) -> ov.Model:
    """q [1, Hq, Lq, D] and new k, v [1, Hkv, n, D] -> [1, Hq, Lq, D], over all k, v of the calls so far."""
    q = ops.parameter([-1, heads, -1, head_dim], np.float32, name="q")
    beam = ops.parameter([-1], np.int32, name="beam")
    new = [ops.parameter([-1, kv_heads, -1, head_dim], np.float32, name=name) for name in "kv"]
    wide, assigned = [], []
    for x in new:
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, kv_heads, -1, head_dim])
        info.data_type, info.variable_id = ov.Type.f32, f"past_{x.get_friendly_name()}"
        variable = Variable(info)
        batch = ops.gather(ops.shape_of(q, "i64"), np.array([0]), np.array(0))
        start = ops.concat([batch, *(ops.constant(np.array([n], np.int64)) for n in (kv_heads, 0, head_dim))], 0)
        empty = ops.broadcast(ops.constant(np.float32(0)), start)
        past = ops.gather(read_value(empty, variable), beam, np.array(0))
        present = ops.concat([past, x], 2)
        assigned.append(assign(present, variable))
        wide.append(_expanded(present, heads, kv_heads, head_dim))
    out = ops.scaled_dot_product_attention(q, *wide, causal=False)
    out.set_friendly_name("attention")
    return ov.Model([ops.result(out)], assigned, [q, *new, beam], "layer")


def _expanded(x: ov.Node, heads: int, kv_heads: int, head_dim: int) -> ov.Node:
    """Each KV head for the query heads of its group; the plugin takes it out again."""
    group = heads // kv_heads
    if group == 1:
        return x
    wide = ops.broadcast(ops.unsqueeze(x, np.array(2)), np.array([1, 1, group, 1, 1]), broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(wide, np.array([0, heads, -1, head_dim]), special_zero=True)


if __name__ == "__main__":
    serve(Layer)
