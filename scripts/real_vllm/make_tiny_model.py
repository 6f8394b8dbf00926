"""Write a tiny Llama model (about 4M random weights) with a byte-level BPE tokenizer and a chat template.

Nothing is downloaded. Its text is noise; an engine that serves it is real: real batching, KV cache, streaming.

    $VLLM_VENV/bin/python scripts/real_vllm/make_tiny_model.py OUT_DIR

A directory that is already complete is left as it is; a half-written one is replaced.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4000
CONTEXT_TOKENS = 8192
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

# Tools, calls and empty contents are rendered, so that no request of a tool-using client breaks the template.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}
{%- if message['tool_calls'] %}<tool_call>{{ message['tool_calls'] | tojson }}</tool_call>{% endif %}
{%- if not loop.last or not continue_final_message %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from Python's own standard library: the text that every machine has."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((path.read_text(errors="ignore") for path in sources), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_weights(vocabulary: int) -> LlamaForCausalLM:
    """Random weights from a fixed seed: every machine makes the same model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main(out: Path) -> None:
    """Write the model beside its place, then move it there in one step."""
    if (out / ".made").exists():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tokenizer = train_tokenizer()
        tokenizer.save_pretrained(unfinished)
        make_weights(len(tokenizer)).save_pretrained(unfinished)
        (unfinished / ".made").touch()
        shutil.rmtree(out, ignore_errors=True)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
