"""Trains a small Llama from nothing on Python's own standard library, with attention by fastattn.

    pip install 'fastattn[examples]'
    python examples/train_tiny.py                                    # some minutes on two CPU cores, no download
    fastattn generate --model out/tiny-python --prompt "def " --temperature 0.7

The text is there wherever Python is; the tokenizer is trained on it; transformers' Trainer does the rest. What makes it
train on fastattn is the line `import fastattn.hf` and `attn_implementation="fastattn"`, nothing else. Everything is
seeded. A tenth of the files is held out, to see what was learnt and not only remembered.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import fastattn.hf  # registers the name "fastattn"

END = "<|end|>"  #: between files


def read_library(seed: int) -> tuple[list[str], list[str]]:
    """The standard library's sources without tests and tables: nine tenths to train on, one tenth to evaluate."""
    root = Path(sysconfig.get_path("stdlib"))
    tests, tables = {"test", "tests", "idlelib", "lib2to3"}, {"encodings", "pydoc_data"}
    left_out = {"site-packages", *tests, *tables}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    random.Random(seed).shuffle(texts)
    held_out = len(texts) // 10
    return texts[held_out:], texts[:held_out]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding over bytes: any text has tokens, and none is unknown.

    A word takes the space that follows it along, so that a prompt such as "def " ends where a token does.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\w+ ?|[^\w\s]+ ?|\n *|\s"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, torch.Tensor]]:
    """The texts end to end, cut into pieces of equal length."""
    end = tokenizer.eos_token_id
    ids = [token for text in tokenizer(texts)["input_ids"] for token in (*text, end)]
    pieces = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]  # the model shifts the labels


def make_model(tokenizer: PreTrainedTokenizerFast, length: int) -> LlamaForCausalLM:
    """About 3 million parameters: 4 layers, 4 query heads that share 2 K/V heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=224,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=56,
        max_position_embeddings=4 * length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=fastattn.hf.NAME)


def plot(history: list[dict[str, Any]], path: Path) -> bool:
    """The losses over the steps, as a PNG. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out files", "o--")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="A small Llama on Python's standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Llama on Python's standard library, with fastattn.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/tiny-python"), metavar="DIR", help="where the model goes (%(default)s)")
    add("--steps", type=int, default=1500, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch-size", type=int, default=4, metavar="N", help="sequences per step (%(default)s)")
    add("--length", type=int, default=256, metavar="N", help="tokens of each sequence (%(default)s)")
    add("--vocab-size", type=int, default=1024, metavar="N", help="of the tokenizer (%(default)s)")
    add("--learning-rate", type=float, default=3e-3, metavar="RATE", help="the highest (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    training, held_out = read_library(arguments.seed)
    tokenizer = train_tokenizer(training, arguments.vocab_size)
    model = make_model(tokenizer, arguments.length)
    # Enough of the held-out text for a steady figure, little enough not to wait for it.
    training_blocks, held_out_blocks = (blocks(texts, tokenizer, arguments.length) for texts in (training, held_out))
    held_out_blocks = random.Random(arguments.seed).sample(held_out_blocks, min(64, len(held_out_blocks)))
    print(
        f"{len(training)} files, {len(training_blocks) * arguments.length / 1e6:.1f} million tokens; "
        f"{model.num_parameters() / 1e6:.1f} million parameters"
    )

    on_gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, arguments.steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=on_gpu,
            logging_steps=max(1, arguments.steps // 30),
            eval_strategy="steps",
            eval_steps=max(1, arguments.steps // 3),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
            dataloader_pin_memory=on_gpu,
        ),
        train_dataset=training_blocks,
        eval_dataset=held_out_blocks,
    )
    trainer.train()

    trainer.save_model()
    tokenizer.save_pretrained(arguments.out)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    after = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at the end; {after:.2f} on the held-out files")
    print(f"      ({math.log(len(tokenizer)):.2f} is what guessing has)")
    picture = arguments.out / "loss.png"
    print(f"plot: {picture}" if plot(history, picture) else "plot: none, matplotlib is not installed")
    prompt = "def "
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    model.eval()
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=True, temperature=0.7)
    print(f"sample:\n{tokenizer.decode(text[0])}\n")
    print(f'more:   fastattn generate --model {arguments.out} --prompt "{prompt}" --temperature 0.7')


if __name__ == "__main__":
    main()
