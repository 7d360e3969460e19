"""Features for selection are directional derivatives of single examples' losses.

They are compared with autograd over the whole model.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.distributed.zoo import with_adapters, zoo_batch, zoo_model
from zods.core.directions import Direction
from zods.data.objectives import example_losses
from zods.selection.features import FeatureExtractor
from zods.selection.target_matrix import find_target

FAMILIES = ["opt", "llama", "mistral", "gpt2", "bert", "roberta", "phi", "qwen3"]
TAKEN = {
    "opt": "model.decoder.layers.1.self_attn.v_proj.weight",
    "llama": "model.layers.1.self_attn.v_proj.weight",
    "mistral": "model.layers.1.self_attn.v_proj.weight",
    "gpt2": "transformer.h.1.attn.c_attn.weight",
    "bert": "bert.encoder.layer.1.attention.self.value.weight",
    "roberta": "roberta.encoder.layer.1.attention.self.value.weight",
    "phi": "model.layers.1.self_attn.v_proj.weight",
    "qwen3": "model.layers.1.self_attn.v_proj.weight",
}
QUICKSTART = Path(__file__).parents[2] / "launch" / "quickstart" / "model"


def model_of(family: str) -> nn.Module:
    return (
        with_adapters(family.removesuffix("+lora"))
        if family.endswith("+lora")
        else zoo_model(family)
    )


def batch_of(family: str, size: int = 5) -> dict[str, Tensor]:
    """Examples of different lengths, with a different number of labels."""
    batch = zoo_batch(family.removesuffix("+lora"), size=size, padded=True)
    if batch["labels"].ndim == 2:
        batch["labels"][0, :6] = -100
        batch["labels"][1, 3:] = -100
    return batch


def extractor(model: nn.Module, kind: str, **options) -> FeatureExtractor:
    return FeatureExtractor(model, kind=kind, rank=2, **options)


def gradients(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The gradients of every example's loss, (B, *shape).

    They come from autograd over the whole model, one example at a time.
    """
    parameter = dict(model.named_parameters())[name]
    needed = parameter.requires_grad
    parameter.requires_grad_(True)
    found = []
    for i in range(len(batch["labels"])):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        logits = model(**{key: value for key, value in one.items() if key != "labels"}).logits
        found += torch.autograd.grad(example_losses(logits, one["labels"]).sum(), parameter)
    parameter.requires_grad_(needed)
    return torch.stack(found)


def projected(
    model: nn.Module, name: str, batch: dict[str, Tensor], seeds: list[int], rank: int = 2
) -> Tensor:
    target = find_target(model, f"^{name}$".replace(".", r"\."))
    z = [
        Direction("low_rank", rank).combine_(
            torch.empty(target.shape), target, seeds=[s], coefficients=[1.0]
        )
        for s in seeds
    ]
    return gradients(model, name, batch).flatten(1).float() @ torch.stack(z).flatten(1).T


@pytest.mark.parametrize("family", [*FAMILIES, "llama+lora", "opt+lora", "gpt2+lora"])
def test_exact_features_are_autograd_over_the_whole_model(family: str):
    model, batch = model_of(family), batch_of(family)
    extract = extractor(model, "exact")
    features, losses = extract(batch, [1, 2, 3])
    expected = projected(model, extract.target.name, batch, [1, 2, 3])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(
        features, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    torch.testing.assert_close(
        losses, example_losses(logits, batch["labels"]), rtol=1e-5, atol=1e-6
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "llama+lora", "gpt2+lora"])
@pytest.mark.parametrize("two_sided", [True, False])
def test_differences_are_near_the_derivatives(family: str, two_sided: bool):
    model, batch = model_of(family).double(), batch_of(family)
    expected, losses = extractor(model, "exact")(batch, [1, 2, 3, 4, 5])
    found, base = extractor(model, "zo", eps=1e-4, two_sided=two_sided)(batch, [1, 2, 3, 4, 5])
    # losses are float32: half a unit in their last place, over eps; the one-sided ones are off by
    # eps times a curvature
    tolerance = 3e-7 * float(losses.max()) / 1e-4 + (
        0 if two_sided else 0.05 * float(expected.abs().max())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(base, losses)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_features_of_classifiers_on_decoders_are_autograd_over_the_whole_model(kind: str):
    """Such models find the position to classify from the tokens of their inputs."""
    config = zoo_model(kind).config
    config.num_labels, config.pad_token_id = 3, 1
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval().double()
    batch = batch_of(kind) | {"labels": torch.tensor([0, 2, 1, 1, 0])}
    expected, _ = extractor(model, "exact")(batch, [1, 2, 3])
    torch.testing.assert_close(
        expected, projected(model, find_target(model).name, batch, [1, 2, 3]), rtol=1e-4, atol=1e-6
    )
    found, _ = extractor(model, "zo", eps=1e-4)(batch, [1, 2, 3])
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=3e-3)  # losses are float32


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_stacks_of_directions_give_what_single_ones_do(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    model, batch = model_of(family).double(), batch_of(family)
    stacked, _ = extractor(model, "zo", eps=0.05)(batch, [1, 2, 3, 4])
    monkeypatch.setattr("zods.selection.features._STACK_ELEMENTS_ON_CPU", 1)
    single, _ = extractor(model, "zo", eps=0.05)(batch, [1, 2, 3, 4])
    torch.testing.assert_close(stacked, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "qwen3", "llama+lora"])
def test_hidden_states_are_the_mean_head_inputs_of_labelled_tokens(family: str):
    model, batch = model_of(family), batch_of(family)
    features, losses = extractor(model, "hidden_states")(batch, [1])
    inputs: list[Tensor] = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    hook.remove()
    for i, labels in enumerate(batch["labels"]):
        rows = [inputs[0][i, t] for t in range(len(labels) - 1) if labels[t + 1] != -100]
        torch.testing.assert_close(features[i], torch.stack(rows).mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses, example_losses(logits, batch["labels"]))


def test_hidden_states_of_a_classifier_are_refused():
    with pytest.raises(ValueError, match=r'features: "hidden_states" .* no output embeddings'):
        extractor(zoo_model("bert"), "hidden_states")


@pytest.mark.parametrize("kind", ["exact", "zo"])
def test_an_example_has_the_same_features_in_any_batch(kind: str):
    """Padding, companions and the number of its labels change nothing: losses are means over an
    example's own labels.
    """
    model, batch = zoo_model("llama").double(), batch_of("llama")
    extract = extractor(model, kind, eps=1e-3)
    together, _ = extract(batch, [1, 2, 3])
    for i in range(len(batch["labels"])):
        length = int(batch["attention_mask"][i].sum())
        alone, _ = extract(
            {key: value[i : i + 1, :length] for key, value in batch.items()}, [1, 2, 3]
        )
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_projection_of_the_last_block_is_taken(family: str):
    target = find_target(zoo_model(family))
    assert target.name == TAKEN[family]
    assert len(target.blocks) == 2


def test_with_adapters_the_second_matrix_of_the_value_projection_is_taken():
    assert find_target(with_adapters("llama")).name.endswith(
        "layers.1.self_attn.v_proj.lora_B.default.weight"
    )
    elsewhere = transformers_lora(["q_proj"])
    assert find_target(elsewhere).name.endswith("layers.1.self_attn.v_proj.weight")


def transformers_lora(modules: list[str]) -> nn.Module:
    import peft

    return peft.get_peft_model(zoo_model("llama"), peft.LoraConfig(r=2, target_modules=modules))


@pytest.mark.parametrize("pattern", [r"layers\.0\..*down_proj", "lm_head"])
def test_any_linear_layer_may_be_asked_for(pattern: str):
    model, batch = zoo_model("llama").double(), batch_of("llama")
    exact = extractor(model, "exact", pattern=pattern)
    features, _ = exact(batch, [1, 2, 3])
    expected = projected(model, exact.target.name, batch, [1, 2, 3]).float()
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    differences, _ = extractor(model, "zo", pattern=pattern, eps=1e-3)(batch, [1, 2, 3])
    torch.testing.assert_close(differences, expected, rtol=1e-2, atol=3e-3)


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"no linear layer's parameter matches 'w_value'.*lm_head"):
        find_target(zoo_model("llama"), "w_value")
    with pytest.raises(ValueError, match="is not a regular expression"):
        find_target(zoo_model("llama"), "layers.(")
    with pytest.raises(ValueError, match="no value projection is known"):
        find_target(zoo_model("mamba"))


@pytest.mark.parametrize("kind", ["exact", "zo", "hidden_states"])
def test_examples_without_labels_or_with_bad_losses_are_marked_and_the_others_are_not(kind: str):
    model, batch = zoo_model("llama"), batch_of("llama")
    expected, _ = extractor(model, kind)(batch, [1, 2, 3])
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = math.nan
    batch["labels"][2] = -100
    batch["input_ids"][3, 0] = 0
    features, losses = extractor(model, kind)(batch, [1, 2, 3])
    usable = losses.isfinite() & features.isfinite().all(1)
    assert usable.tolist() == [True, True, False, False, True]
    torch.testing.assert_close(features[usable], expected[usable], rtol=1e-3, atol=1e-3)


def test_a_batch_in_which_nothing_is_labelled_has_no_usable_example():
    batch = batch_of("llama")
    batch["labels"][:] = -100
    for kind in ("exact", "zo"):
        _, losses = extractor(zoo_model("llama"), kind)(batch, [1, 2, 3])
        assert losses.isnan().all()


def test_the_model_is_left_as_it_was():
    model = zoo_model("llama")
    model.train()
    model.model.layers[0].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for kind in ("exact", "zo"):
        extractor(model, kind)(batch_of("llama"), [1, 2, 3])
        assert [m.training for m in (model, model.model.layers[0], model.model.layers[1])] == [
            True,
            False,
            True,
        ]
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert (
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
        )
        assert "forward" not in model.model.layers[0].__dict__
        assert torch.is_grad_enabled()


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize(
    ("kind", "num_texts"),
    [("exact", 48), ("zo", 12), pytest.param("zo", 48, marks=pytest.mark.slow)],
)
def test_distances_of_features_are_in_the_order_of_those_of_the_gradients(
    kind: str, num_texts: int
):
    """Spearman's correlation is at least 0.95 with 64 directions.

    The model is the quickstart's pretrained decoder, the texts are prose of Python's manual with 2
    to 48 labels each. The correlation is 0.92 where all examples have the same number of labels:
    all distances are then much the same, and any 64 random directions, dense ones too, give a
    distance only to within one part in eleven.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        QUICKSTART, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART)
    texts = [text[200:900] for text in pydoc_data.topics.topics.values() if len(text) > 900]
    texts = texts[:num_texts]
    batch = {"input_ids": torch.tensor([tokenizer(text)["input_ids"][:64] for text in texts])}
    batch |= {
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "labels": batch["input_ids"].clone(),
    }
    for i, row in enumerate(batch["labels"]):
        row[: 64 - (2, 4, 8, 16, 32, 48)[i % 6]] = -100
    pairs = torch.triu_indices(len(texts), len(texts), 1)
    true = torch.cdist(*[gradients(model, find_target(model).name, batch).flatten(1)] * 2)[
        pairs[0], pairs[1]
    ]
    features, _ = FeatureExtractor(model, kind=kind, rank=4)(batch, range(64))
    found = torch.cdist(features, features)[pairs[0], pairs[1]]
    assert spearman(found, true) >= 0.95
