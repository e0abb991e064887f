"""Conda in TRL's SFTTrainer, for LoRA (or DoRA) of PEFT, under DDP:

torchrun --nproc-per-node 2 integrations/examples/trl_lora.py
"""

import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from conda_dist.integrations.huggingface import conda_for_trainer

STEPS, VOCABULARY, WIDTH, BATCH = 20, 64, 32, 16
FOLDER = sys.argv[1] if len(sys.argv) > 1 else "output"
RESUME = sys.argv[2] if len(sys.argv) > 2 else None  # a checkpoint of any number of ranks
RANKS = int(os.environ.get("WORLD_SIZE", 1))

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
torch.manual_seed(0)
shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4))
tokens = (torch.randint(VOCABULARY, (BATCH * STEPS, 1)) + torch.arange(16)) % VOCABULARY

args = SFTConfig(
    FOLDER,
    learning_rate=4e-2,  # AdamW's rate over Conda's scale of 0.25
    max_steps=STEPS,
    per_device_train_batch_size=BATCH // RANKS,
    use_cpu=not torch.accelerator.is_available(),
    bf16=False,
    gradient_checkpointing=False,
    logging_steps=1,
    save_steps=STEPS // 2,
    report_to=[],
    disable_tqdm=True,
)
trainer = SFTTrainer(
    model,
    args,
    train_dataset=Dataset.from_list([{"input_ids": row} for row in tokens.tolist()]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", use_dora=False),
    optimizer_cls_and_kwargs=conda_for_trainer(args, adamw_scale=0.25, update_proj_gap=10),
)
trainer.train(resume_from_checkpoint=RESUME)
for line in trainer.state.log_history if trainer.is_world_process_zero() else ():
    if "loss" in line:
        print(f"step {line['step'] - 1} loss {line['loss']:.3f}")
