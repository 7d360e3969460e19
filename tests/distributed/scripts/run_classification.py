"""Fine-tune a classifier, in the manner of transformers' example run_glue.

It is written for transformers' Trainer. The tests change its import, and nothing else.
"""

from dataclasses import dataclass

import numpy
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from transformers import Trainer, TrainingArguments  # isort: skip


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    validation_file: str
    cache_dir: str
    max_seq_length: int = 32


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    chosen = numpy.argmax(prediction.predictions, axis=1)
    return {"accuracy": float((chosen == prediction.label_ids).mean())}


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    arguments, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    raw = load_dataset("json", data_files=files, cache_dir=arguments.cache_dir)
    labels = sorted(set(raw["train"]["label"]))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, num_labels=len(labels)
    )

    def tokenized(rows):
        found = tokenizer(rows["sentence"], truncation=True, max_length=arguments.max_seq_length)
        return {**found, "label": [labels.index(label) for label in rows["label"]]}

    with training_args.main_process_first(desc="tokenization"):
        data = raw.map(tokenized, batched=True)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"] if training_args.do_train else None,
        eval_dataset=data["validation"] if training_args.do_eval else None,
        compute_metrics=accuracy,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if training_args.do_predict:
        predictions = trainer.predict(data["validation"]).predictions
        trainer.save_metrics("predict", {"classes": numpy.argmax(predictions, axis=1).tolist()})


if __name__ == "__main__":
    main()
