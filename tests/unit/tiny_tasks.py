"""Tiny data, tokenizers and models for the tests of the tasks.

All of them are made here; nothing is downloaded.
"""

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zods.data.evaluation import Forwards, SeveralForwards
from zods.tasks import build_task
from zods.tasks.answers import Answers
from zods.tasks.instruction import Instruction
from zods.tasks.options import Options
from zods.tasks.prompts import Template

TEXTS = [
    "a fine movie",
    "a dull movie that never ends and never starts",
    "great fun",
    "terrible terrible plot",
]
REVIEWS = datasets.Dataset.from_dict(
    {"text": TEXTS, "label": [1, 0, 1, 0], "topic": ["b", "a", "b", "a"]}
)
ORDERS = datasets.Dataset.from_dict(
    {
        "instruction": ["say one", "say two and then say three"],
        "output": ["one", "two three four five six"],
    }
)
CLASSES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
)
TEMPLATE = "{text}\nIt was {label}"
WORDS = ["terrible", "great"]


def make_tokenizer(kind):
    """Make a tiny tokenizer.

    kind: "gpt2" is byte-level BPE, and "llama" adds a BOS token to it. "sentencepiece" marks the
    starts of words. "bert" is WordPiece, with token types for pairs of texts.
    """
    corpus = [*TEXTS, "It was great It was terrible say one two three four five six Area :"] * 5
    special = ["<s>", "</s>", "[PAD]", "[UNK]"]
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.train_from_iterator(
            corpus, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
        )
        tokenizer.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    alphabet = []
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    if kind in ("llama", "sentencepiece"):
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


# arguments of `build_task` that describe the model
MODEL_ARGUMENTS = {
    "num_embeddings": None,
    "has_token_types": True,
    "class_names": None,
}


def make_task(name, kind="llama", dataset=None, max_length=64, **settings):
    if name == "prompted":
        settings = {"template": TEMPLATE, "label_words": WORDS, **settings}
    if dataset is None:
        dataset = ORDERS if name == "instruction" else REVIEWS
    return build_task(
        name,
        make_tokenizer(kind),
        dataset,
        max_length=max_length,
        **{**MODEL_ARGUMENTS, **settings},
    )


def labelled_text(task, batch):
    return [task.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=450,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return LlamaForCausalLM(config).eval()


def outputs_of(model, inputs, micro_batch=2):
    """The outputs that `measure` takes, for inputs of `collate_eval`."""
    if not isinstance(inputs, SeveralForwards):
        assert "labels" not in inputs
        return model(**inputs)
    return inputs.run(Forwards(lambda part: model(**part), micro_batch))


def reviews(**columns):
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1], **columns})


CHOICES = datasets.Dataset.from_dict(
    {
        "text": ["a fine movie", "a dull movie that never ends", "great fun"],
        "ends": [["one", "two three"], ["great", "terrible plot", "four"], ["six", "one"]],
        "answer": [1, 0, 0],
    }
)


def choices(scoring="mean", kind="llama"):
    template = Template.parse("{text}\nIt was {ends}")
    return Options(make_tokenizer(kind), template, 64, 0, scoring)


QUESTIONS = datasets.Dataset.from_dict(
    {"q": ["say one", "say two and then say three"], "a": ["one", "two three"]}
)


def answers(**settings):
    template = Template.parse("{q}\n{a}")
    settings = {"max_new_tokens": 5, **settings}
    return Answers(Instruction(make_tokenizer("llama"), template, 64, 0), **settings)
