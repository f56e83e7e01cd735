"""Peak memory of an evaluation over a vocabulary as real models have it: a piece's logits, not a passage's."""

from __future__ import annotations

import subprocess
import sys

VOCABULARY, TOKENS, PIECE = 151_936, 400, 16

PROBE = f"""
import resource
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.heap import release_large_blocks
from turboattention.evaluation.records import Records
from turboattention.evaluation.text_metrics import TextTask

from turboattention.evaluation.hf.subject import TransformersSubject
from turboattention.integrations.transformers.language_model import LanguageModel
import torch, transformers

release_large_blocks()
torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size={VOCABULARY}, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None)
model = transformers.LlamaForCausalLM(config).eval()

class Numbers(TransformersSubject):
    begin = []
    def encode(self, text): return [int(word) for word in text.split()]
    def decode(self, ids): return " ".join(map(str, ids))

names = ["int8", "int4"]
def quiet(done, total): pass
text = " ".join(str(number * 211 % {VOCABULARY}) for number in range({TOKENS}))
subject = Numbers(LanguageModel("tiny", model, None, "sdpa"))
def run(context):
    TextTask(text, "numbers", context, 1, {PIECE}).run(
        subject, [METHODS[name] for name in names], Records(None).parts("", dict.fromkeys(names, dict())), quiet)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
short = run(3 * {PIECE})  # everything imported, and a few pieces seen
print((run({TOKENS}) - short) * 1024)
"""


def test_a_long_passage_takes_no_more_than_a_short_one() -> None:
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    piece = 4 * VOCABULARY * PIECE
    passage = 4 * VOCABULARY * TOKENS  # of one method: 243 MB, and there are the own cache and two
    assert int(run.stdout) < 4 * piece < passage / 6
