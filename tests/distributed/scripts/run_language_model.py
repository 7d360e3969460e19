"""Fine-tune a causal language model on a text file, in the manner of transformers' example run_clm.

It is written for transformers' Trainer. The tests change its import, and nothing else.
"""

import math
from dataclasses import dataclass
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    validation_file: str
    cache_dir: str
    block_size: int = 24


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    arguments, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    raw = load_dataset("text", data_files=files, cache_dir=arguments.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
    size = arguments.block_size

    def blocks(rows):
        """The rows' tokens in a row, in blocks of the same size."""
        ids = list(chain.from_iterable(tokenizer(rows["text"])["input_ids"]))
        cut = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        return {"input_ids": cut, "labels": cut}

    with training_args.main_process_first(desc="grouping texts together"):
        data = raw.map(blocks, batched=True, remove_columns=["text"])

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
