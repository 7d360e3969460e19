"""Losses agree with those of transformers, and outputs without a loss are an error."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.reference.objective import objective, token_losses
from zods.data import objectives
from zods.data.loss_probes import fits_cross_entropy, shift_probes
from zods.data.objectives import Objective, batch_loss, loss_count, sequence_log_likelihood

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def language_batch(num_rows=3, length=7):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(50, (num_rows, length), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, 5:] = -100
    return {"input_ids": input_ids, "labels": labels}


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)),
    ],
    ids=["llama", "gpt2"],
)
def test_a_language_models_loss_from_logits_equals_that_of_transformers(make_model):
    torch.manual_seed(0)
    model, batch = make_model().eval(), language_batch()
    own = model(**batch).loss
    from_logits = batch_loss({"logits": model(batch["input_ids"]).logits}, batch)
    # The same sum in another order: a few float32 roundings of numbers near 4.
    torch.testing.assert_close(from_logits, own.double(), rtol=1e-6, atol=0)


def test_a_classifiers_loss_from_logits_equals_that_of_transformers():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).eval()
    batch = {"input_ids": language_batch()["input_ids"], "labels": torch.tensor([2, 0, 1])}
    own = model(**batch).loss
    from_logits = batch_loss({"logits": model(batch["input_ids"]).logits}, batch)
    torch.testing.assert_close(from_logits, own.double(), rtol=1e-6, atol=0)


def test_the_models_own_loss_is_found_in_all_forms_of_outputs_and_becomes_float64():
    loss, logits = torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(2, 3)
    batch = {"labels": torch.tensor([0, 1])}
    for outputs in (
        loss,
        (loss, logits),
        {"loss": loss, "logits": logits},
        SimpleNamespace(loss=loss, logits=logits),
    ):
        found = batch_loss(outputs, batch)
        assert (found.item(), found.dtype, found.ndim) == (1.5, torch.float64, 0)


def test_a_classification_loss_rounded_to_16_bits_is_computed_again_in_float32():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3)).eval().bfloat16()
    batch = {"input_ids": language_batch()["input_ids"], "labels": torch.tensor([2, 0, 1])}
    outputs = model(**batch)
    assert outputs.loss.dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(outputs.logits.float(), batch["labels"])
    assert exact != outputs.loss.float(), "the test needs a loss that changes when it is rounded"
    assert batch_loss(outputs, batch) == exact


def test_where_the_loss_is_none_it_is_computed_from_the_logits():
    outputs = SimpleNamespace(loss=None, logits=torch.zeros(2, 4))
    assert batch_loss(outputs, {"labels": torch.tensor([0, 3])}).item() == pytest.approx(1.3862944)


@pytest.mark.parametrize(
    ("outputs", "batch", "message"),
    [
        (
            {"logits": torch.zeros(2, 3)},
            {"input_ids": torch.zeros(2, 3)},
            "keys logits .* keys input_ids; pass labels",
        ),
        ({"hidden": torch.zeros(2)}, {"labels": torch.zeros(2)}, "keys hidden"),
        (
            torch.zeros(2, 3),
            (torch.zeros(2, 5), torch.zeros(2)),
            r"a tensor of shape \(2, 3\).*wrap the model",
        ),
        ((torch.zeros(2, 3),), {"labels": torch.zeros(2)}, "tuple of a tensor"),
        ({"loss": torch.zeros(2)}, {}, r"0-d tensor.*shape \(2,\)"),
        ({"loss": 0.5}, {}, "float"),
        ({"logits": torch.zeros(2, 3)}, {"labels": torch.zeros(2)}, "integer labels"),
        (
            {"logits": torch.zeros(2, 6, 3)},
            {"labels": torch.zeros(2, 5, dtype=torch.int64)},
            "do not fit",
        ),
    ],
)
def test_outputs_without_a_loss_are_an_error_that_describes_them(outputs, batch, message):
    with pytest.raises(ValueError, match=message):
        batch_loss(outputs, batch)


def test_log_likelihood_is_the_sum_over_labelled_tokens_for_chunks_of_any_size(monkeypatch):
    labels = language_batch()["labels"]
    logits = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(2))
    expected = [
        sum(
            logits[r, t].log_softmax(0)[labels[r, t + 1]].item()
            for t in range(6)
            if labels[r, t + 1] != -100
        )
        for r in range(3)
    ]
    for chunk_elements in (1, 150, objectives._CHUNK_ELEMENTS_ON_CPU):
        monkeypatch.setattr(objectives, "_CHUNK_ELEMENTS_ON_CPU", chunk_elements)
        sums, counts = sequence_log_likelihood(logits, labels)
        assert sums.tolist() == pytest.approx(expected, rel=1e-6)
        assert counts.tolist() == [3, 4, 6]


def test_no_float32_copy_of_all_logits_is_made(monkeypatch):
    class LargestFloat32(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.numel = max(self.numel, result.numel())
            return result

    monkeypatch.setattr(objectives, "_CHUNK_ELEMENTS_ON_CPU", 4000)
    with LargestFloat32() as largest:
        sequence_log_likelihood(
            torch.zeros(4, 50, 1000, dtype=torch.bfloat16), torch.zeros(4, 50, dtype=torch.int64)
        )
    assert largest.numel == 4000


def test_infinities_and_nan_affect_only_their_own_row():
    logits, labels = torch.zeros(3, 3, 5), torch.ones(3, 3, dtype=torch.int64)
    logits[0, 0, 1] = -torch.inf
    logits[1, 1, 2] = torch.nan
    logits[2, 2] = torch.nan  # the last position predicts nothing
    sums, _ = sequence_log_likelihood(logits, labels)
    assert sums[0] == -torch.inf
    assert sums[1].isnan()
    assert sums[2].isfinite()


def test_the_loss_from_logits_can_be_differentiated():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 4]])
    batch_loss({"logits": logits}, {"labels": labels}).backward()
    found, logits.grad = logits.grad, None
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-7)


def test_a_classification_loss_in_bf16_is_not_rounded_to_bf16():
    """The losses of two points may differ by less than the spacing of bf16 numbers.

    A loss in bf16 would lose the difference.
    """
    logits = torch.tensor([[0.25, 0.5], [1.0, -0.5]], dtype=torch.bfloat16)
    labels = torch.tensor([0, 1])
    own = torch.nn.functional.cross_entropy(logits, labels)
    exact = torch.nn.functional.cross_entropy(logits.float(), labels)
    assert own.dtype == torch.bfloat16
    assert own.float() != exact
    assert batch_loss({"loss": own, "logits": logits}, {"labels": labels}) == exact


def uneven_batch(shifted):
    """Logits and labels of four rows, with 1, 0, 6 and 3 label tokens.

    Without the shift, the last row has one more label token, at its first position.
    """
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(4, 7, 9, generator=generator)
    labels = torch.randint(9, (4, 7), generator=generator)
    for row, start in enumerate((6, 7, 1, 4)):
        labels[row, :start] = -100
    if not shifted:
        labels[3, 0] = 2
    return logits, labels


@pytest.mark.parametrize("mean", ["tokens", "examples"])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 0.5, 3.0], [0.0, 1.0, 1.0, 0.0]])
def test_the_objective_is_the_same_for_every_division_of_a_batch(mean, shifted, weights):
    """A part without any label token has the weight zero."""
    logits, labels = uneven_batch(shifted)
    expected = objective(token_losses(logits, labels, shifted), mean, weights)
    definition = Objective(mean, shifted)
    for sizes in ([4], [1, 3], [2, 2], [3, 1], [1, 1, 1, 1]):
        total = count = 0.0
        for part_logits, part_labels, part_weights in zip(
            logits.split(sizes),
            labels.split(sizes),
            torch.tensor(weights or [1.0] * 4).split(sizes),
            strict=True,
        ):
            batch = {
                "labels": part_labels,
                **({} if weights is None else {objectives.WEIGHTS: part_weights}),
            }
            part_count = float(loss_count(batch, definition))
            total += (
                part_count * float(batch_loss({"logits": part_logits}, batch, definition))
                if part_count
                else 0.0
            )
            count += part_count
        assert total / count == pytest.approx(float(expected), rel=1e-6), sizes


def test_a_micro_batch_is_weighted_by_the_number_that_its_loss_is_a_mean_over():
    tokens = {
        "first": torch.zeros(50, 2),
        "labels": torch.tensor([[4, 1, -100], [-100, -100, -100], [1, 2, 3]]),
    }
    assert [
        float(loss_count(tokens, Objective("tokens", shifted))) for shifted in (True, False)
    ] == [3, 5]
    assert float(loss_count(tokens, Objective("examples"))) == 2
    for mean in ("tokens", "examples"):
        assert float(loss_count({"labels": torch.tensor([1, -100, 0])}, Objective(mean))) == 2
        assert float(loss_count({"labels": torch.rand(3)}, Objective(mean))) == 3
        assert float(loss_count({"pixels": torch.rand(5, 2)}, Objective(mean))) == 5


def test_a_loss_is_compared_with_the_cross_entropy_of_a_given_shift():
    logits, labels = uneven_batch(False)
    outputs = {True: logits[:, :-1], False: logits}
    for shifted, scores in outputs.items():
        wanted = labels[:, 1:] if shifted else labels
        own = torch.nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        for loss, expected in ((own, True), (1.01 * own, False)):
            found = {"loss": loss, "logits": logits}
            assert fits_cross_entropy(found, {"labels": labels}, shifted) is expected
            assert fits_cross_entropy(found, {"labels": labels}, not shifted) is False
    nothing = {"labels": torch.full_like(labels, -100)}
    assert (
        fits_cross_entropy({"loss": torch.tensor(torch.nan), "logits": logits}, nothing, True)
        is None
    )


def test_the_probes_differ_only_in_the_first_label():
    without, with_first = shift_probes(
        {"labels": torch.full((2, 3), -100), "ids": torch.zeros(2, 3)}
    )
    assert (without["labels"] != with_first["labels"]).nonzero().tolist() == [[0, 0], [1, 0]]
    assert (without["labels"] != -100).nonzero().tolist() == [[0, 2], [1, 2]]
    for other in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)):
        assert shift_probes({"labels": other}) is None


def test_the_mean_over_examples_is_refused_where_a_model_gives_one_loss_for_all():
    own, batch = {"loss": torch.tensor(1.0)}, {"labels": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r'"examples" needs .* gives one for 2 .*"tokens"'):
        batch_loss(own, batch, Objective("examples", own=True))
    one = {"labels": batch["labels"][:1]}
    assert batch_loss(own, one, Objective("examples", own=True)) == 1.0
    assert batch_loss(own, batch, Objective("tokens", own=True)) == 1.0
