"""Tensor parallelism of transformers: two processes give the same tokens as one, and each stores its own KV heads."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turboattention import ChannelOrder, TurboConfig
from turboattention.errors import ConfigError, InputError, UnsupportedError
from turboattention.integrations.model_shape import ModelShape
from turboattention.integrations.transformers import TurboCache, calibrate
from turboattention.integrations.transformers.layer import TurboLayer
from turboattention.integrations.transformers.parallel import HeadShare, TensorParallel

WORKER = Path(__file__).with_name("parallel_worker.py")
LAYERS, HEADS, BATCH = 2, 4, 2
WIDTHS = [[[4, 2, 2, 4], [2, 4, 4, 2]], [[3, 2, 2, 3], [2, 8, 8, 2]]]  # per layer K and V; each half has as many bits
QUIET: dict[str, Any] = {"guard": "off"}
CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "config": {"bits": 4, **QUIET}},
    "4": {"dtype": "float64", "config": {"bits": 4}},
    "mixed": {"dtype": "float64", "config": {"bits": "mixed", **QUIET}, "head_bits": WIDTHS},
    "calibrated": {"dtype": "float64", "config": {"bits": "mixed", **QUIET}, "calibrated": True},
    "beams": {"dtype": "float64", "config": {"bits": 3, **QUIET}, "padding": 7, "options": {"num_beams": 3}},
    "guard": {"dtype": "float64", "config": {"bits": "mixed"}, "head_bits": [[8, 8, 2, 8]] * LAYERS},
}
LAYER_BYTES = 8 * BATCH + 8  # lengths and handle, which every process has


def tiny_model() -> LlamaForCausalLM:
    """8 query heads over 4 KV heads, whose keys of head 2 are large: two bits are too few for them."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * HEADS,
        num_key_value_heads=HEADS,
        head_dim=64,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data[2 * 64 : 3 * 64] *= 30  # type: ignore[operator]
    return model


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The results of one process, and of each of two; started once for all cases."""
    pytest.importorskip("accelerate", reason="transformers loads no parts of models without it")
    folder = tmp_path_factory.mktemp("parallel")
    model = tiny_model()
    model.save_pretrained(folder / "model")
    text = torch.randint(3, 96, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    calibrate(model.double(), text, length=200, means=True).save(folder / "calibration")
    (folder / "cases.json").write_text(json.dumps(CASES))
    worker = SimpleNamespace(**runpy.run_path(str(WORKER)))
    worker.enable()
    models = {dtype: worker.load(folder, dtype) for dtype in ("float32", "float64")}
    single = {name: worker.run(models[case["dtype"]], folder, case) for name, case in CASES.items()}
    (folder / "whole").mkdir()
    whole = worker.new_cache(models["float64"], folder, CASES["calibrated"])
    single["saved"] = worker.saved_and_loaded(models["float64"], folder / "whole", whole)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, single=single, ranks=ranks, config=models["float64"].config)


class TestTwoProcesses:
    @pytest.mark.parametrize("name", CASES)
    def test_give_the_tokens_of_one(self, name, outcome):
        assert [rank[name]["ids"] for rank in outcome.ranks] == [outcome.single[name]["ids"]] * 2

    @pytest.mark.parametrize("name", ["float32", "4", "mixed"])
    def test_hold_half_each(self, name, outcome):
        single = outcome.single[name]
        for rank in outcome.ranks:
            assert rank[name]["heads"] == [HEADS // 2] * LAYERS
            assert rank[name]["fp16_nbytes"] * 2 == single["fp16_nbytes"]
            assert (rank[name]["nbytes"] - LAYERS * LAYER_BYTES) * 2 == single["nbytes"] - LAYERS * LAYER_BYTES

    @pytest.mark.parametrize("name", CASES)
    def test_hold_their_own_heads(self, name, outcome):
        single, parts = outcome.single[name], [rank[name] for rank in outcome.ranks]
        if "padding" not in CASES[name]:  # every process knows where it is
            own = [part["nbytes"] - LAYERS * LAYER_BYTES for part in parts]
            assert sum(own) == single["nbytes"] - LAYERS * LAYER_BYTES
        for layer, bits in enumerate(single["bits"]):
            assert [[*a, *b] for a, b in zip(*(part["bits"][layer] for part in parts), strict=True)] == bits
        if single["means"][0] is not None:
            assert [[*a, *b] for a, b in zip(*(part["means"] for part in parts), strict=True)] == single["means"]

    def test_the_calibration_tells_heads_apart(self, outcome):
        assert any(bits[0][:2] != bits[0][2:] for bits in outcome.single["calibrated"]["bits"])
        assert outcome.single["calibrated"]["means"][0] is not None

    def test_the_guard_numbers_the_models_heads(self, outcome):
        """Reported once, by the process that stores the head."""
        expected = outcome.single["guard"]["warnings"]
        assert expected
        assert all("KV head 2 loses" in message and "head 2 has" in message for message in expected)
        assert [rank["guard"]["warnings"] for rank in outcome.ranks] == [[], expected]

    def test_save_and_load_their_parts(self, outcome):
        names = {"prompt.cache.rank0of2", "prompt.cache.rank1of2", "again.cache.rank0of2", "again.cache.rank1of2"}
        assert {path.name for path in outcome.folder.glob("*.cache*")} == names
        single = outcome.single["saved"]
        assert (single["known"], single["first"], single["first_again"]) == (70, [0] * LAYERS, [0] * LAYERS)
        for rank, result in enumerate(outcome.ranks):
            heads = [rank * HEADS // 2] * LAYERS
            assert result["saved"] == {**single, "first": heads, "first_again": heads}

    def test_a_loaded_part_serves_other_texts(self, outcome):
        assert outcome.single["saved"]["again"] == outcome.single["calibrated"]["ids"]

    def test_part_of_a_cache_is_none_for_a_single_process(self, outcome):
        with pytest.raises(InputError, match="saved by a single process, got one saved by tensor parallel rank 1 of 2"):
            TurboCache.load(outcome.folder / "prompt.cache.rank1of2", outcome.config)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mixed", "ConfigError: head_bits: expected widths for the 4 KV heads of layer 0, by themselves"),
            ("widths", "ConfigError: head_bits: expected entries for all 4 KV heads, or for the 2 that"),
            ("calibrate", "UnsupportedError: model: expected a whole model, got tensor parallel rank"),
            ("whole", "ShapeError: key_states: expected (batch, KV heads, head_dim of keys, of values) = (2, 4, "),
            ("unsaid", "InputError: path: expected a cache saved by a single process, got one saved by"),
        ],
    )
    def test_refuse(self, name, message, outcome):
        for rank in outcome.ranks:
            assert rank["refusals"][name].startswith(message)


class TestShares:
    def test_whole_ones(self):
        """A single process, attention that a plan does not split, and models without this information."""
        assert TensorParallel().share(3, 4) == HeadShare(0, 3, 3)
        assert TensorParallel(1, 2).share(4, 4) == HeadShare(0, 4, 4)
        assert TensorParallel(1, 2).share(4, None) == HeadShare(0, 4, 4)
        assert HeadShare(0, 4, 4).cut([2, 2], "head_bits", -1) == [2, 2]

    def test_equal_parts(self):
        assert [TensorParallel(rank, 3).share(2, 6) for rank in range(3)] == [HeadShare(i, 2, 6) for i in (0, 2, 4)]
        with pytest.raises(UnsupportedError, match=r"all 6 KV heads, or an equal part .* each of 4 .*, got 2"):
            TensorParallel(0, 4).share(2, 6)

    @pytest.mark.parametrize("bits", [[2, 3, 4, 8], torch.tensor([[2, 3, 4, 8], [8, 4, 3, 2]])])
    def test_cut(self, bits):
        part = HeadShare(2, 2, 4).cut(bits, "head_bits", -1)
        assert torch.equal(part, torch.as_tensor(bits)[..., 2:])
        assert torch.equal(HeadShare(2, 2, 4).cut(part, "head_bits", -1), part)

    @pytest.mark.parametrize("bits", ["44", [[4], [4, 4]], 4])
    def test_what_are_no_widths_is_refused_as_ever(self, bits):
        shape = ModelShape("llama", 1, 8, 4, 64, 64, 96)
        layer = TurboLayer(0, head_bits=bits, model=shape, parallel=TensorParallel(0, 2))
        with pytest.raises(ConfigError, match=r"^head_bits: expected"):
            layer.update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64))

    def test_orders_of_channels_are_cut(self):
        order = ChannelOrder(torch.arange(64).roll(5).repeat(4, 1), torch.tensor([True, False, False, True]))
        shape, config = ModelShape("llama", 1, 8, 4, 64, 64, 96), TurboConfig(reorder_k=True)
        for given in (order, order.of_heads(slice(2, 4))):
            layer = TurboLayer(0, config=config, k_order=given, model=shape, parallel=TensorParallel(1, 2))
            layer.update(torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64))
            assert layer.kv.given_order.permutation.tolist() == order.permutation[2:].tolist()
            assert layer.kv.given_order.halved.tolist() == [False, True]

    def test_no_processes_started(self):
        """A config can outlive the processes it was made for."""
        config = LlamaConfig()
        config.distributed_config = SimpleNamespace(tp_size=2)
        assert TensorParallel.of(config) == TensorParallel()

    def test_the_other_ranks_file(self):
        with pytest.raises(InputError, match=r"saved by tensor parallel rank 1 of 2, got one saved by .* rank 0 of 2"):
            TensorParallel(1, 2).check(TensorParallel(0, 2), "name.rank1of2")
