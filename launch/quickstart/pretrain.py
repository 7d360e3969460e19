"""Make the quickstart's model: a tokenizer and a small Llama, pretrained with AdamW.

    python pretrain.py OUT_FOLDER

The text is `pydoc_data.topics` (the language reference) and the pieces of the standard library that
make_data.py does not hold out. One row in five is a prompt of the task with a random label. So the
model learns the form of an answer, but not which answer is right.
"""

import argparse
import random
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from make_data import LABELS, Piece, split, standard_library
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE, END = 2048, "<|endoftext|>"
ROW, BATCH, EPOCHS, LR = 64, 32, 1, 3e-3  # tokens of a row, rows of a step
MAX_WHOLE = 400  # characters of a docstring or function body


def make_rows(
    tokenizer: PreTrainedTokenizerFast, pieces: list[Piece], rng: random.Random
) -> list[list[int]]:
    """Make one epoch: all text cut into rows, and prompts with a random answer, shuffled."""
    texts = [*topics.values(), *(piece.whole[:MAX_WHOLE] for piece in pieces)]
    rows = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows += [ids[i : i + ROW] for i in range(0, len(ids), ROW)]
    for piece in rng.sample(pieces, min(len(pieces), len(rows) // 4)):
        rows.append(tokenizer(f"{piece.opening}\nKind: {rng.choice(LABELS)}")["input_ids"])
    rng.shuffle(rows)
    return [row for row in rows if len(row) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the model and its tokenizer")
    out = parser.parse_args().out
    others, _ = split(list(standard_library()))
    texts = [*topics.values(), *(piece.whole[:MAX_WHOLE] for piece in others)]

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, min_frequency=2, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END
    )
    tokenizer.save_pretrained(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    rng = random.Random(0)
    epochs = [make_rows(tokenizer, others, rng) for _ in range(EPOCHS)]
    print(
        f"{model.num_parameters()} parameters, {sum(map(len, texts))} characters of text",
        flush=True,
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    steps = sum(-(-len(rows) // BATCH) for rows in epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps + 1, pct_start=0.05)
    start = time.perf_counter()
    for epoch, rows in enumerate(epochs, 1):
        total = 0.0
        for i in range(0, len(rows), BATCH):
            ids = [torch.tensor(row) for row in rows[i : i + BATCH]]
            labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
            loss = model(
                input_ids=labels.clamp(min=0), attention_mask=labels.ge(0).long(), labels=labels
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(ids)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch} of {EPOCHS}: loss {total / len(rows):.3f} per token, {seconds:.0f} s",
            flush=True,
        )
        model.save_pretrained(out)


if __name__ == "__main__":
    main()
