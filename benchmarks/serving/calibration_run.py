"""A calibration of a real model on the bundled text, for channel orders and means of keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from turboattention import bundled
from turboattention.integrations.transformers import calibrate, enable


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Saves it in spec["folder"], with the means of K if spec["means"]. Its widths are not used."""
    enable()
    model = AutoModelForCausalLM.from_pretrained(spec["model"], attn_implementation="turbo", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(spec["model"])(bundled.text()).input_ids
    calibrate(model, ids, strategy="even", means=spec["means"]).save(spec["folder"])
    return {"tokens": len(ids)}
