"""The batch: documents packed into a row, and the contradictions that are refused."""
import pytest
import torch

from nanoinfra.data.batch import Batch, check_batch, pack_documents
from nanoinfra.data.token_datasets import IGNORE_INDEX

X = torch.arange(6).view(2, 3)


def document(*numbers):
    return torch.tensor(numbers), torch.tensor([*numbers[1:], IGNORE_INDEX])


def test_documents_are_packed_into_one_row():
    got = pack_documents([document(5, 6, 7), document(8), document(1, 2)])
    assert got.tokens.tolist() == [[5, 6, 7, 8, 1, 2]] and got.weights is None
    assert got.targets.tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX, 2, IGNORE_INDEX]]
    assert got.positions.tolist() == [0, 1, 2, 0, 0, 1] and got.document_ends == (3, 4, 6)
    assert got.num_valid_targets == 3
    check_batch(got, context=3)


def test_weights_are_1_where_others_have_some():
    got = pack_documents([document(5, 6, 7), (*document(1, 2), torch.tensor([0.25, 0.5]))])
    assert got.weights.tolist() == [[1, 1, 0, 0.25, 0.5]]


@pytest.mark.parametrize("documents", [
    [(torch.arange(3), torch.arange(2))], [(torch.arange(0), torch.arange(0))], [(torch.tensor(1),) * 2],
    [(torch.arange(3),)], [(torch.arange(3), torch.arange(3), torch.ones(4))], [(X, X)]])
def test_a_document_of_other_shapes_is_refused(documents):
    with pytest.raises(ValueError, match="document 1 has parts of shapes .* give .tokens, targets. or"):
        pack_documents([document(1, 2), *documents])


def test_nothing_to_pack_is_refused():
    with pytest.raises(ValueError, match="no documents to pack; give at least one"):
        pack_documents([])


def test_a_batch_moves_with_all_its_tensors():
    got = Batch(X, X, torch.ones(2, 3), None, None).to("meta")
    assert [part.device.type for part in got[:3]] == ["meta"] * 3 and got[3:] == (None, None)


@pytest.mark.parametrize("batch", [
    Batch(X, X), Batch(X, X, torch.ones(2, 3), X), Batch(X, X, positions=torch.arange(3)),
    Batch(X[:1], X[:1], document_ends=(1, 3))])
def test_a_batch_that_agrees_with_itself_passes(batch):
    check_batch(batch, context=6)


@pytest.mark.parametrize("batch, complaint", [
    ((X, X), r"is a Batch, and this is a tuple; give Batch\(tokens, targets\)"),
    (Batch(X[0], X[0]), r"tokens have shape \(3,\); give \(B, T\)"),
    (Batch(X, X[:, 1:]), r"targets have shape \(2, 2\) beside tokens of \(2, 3\); give \(2, 3\)"),
    (Batch(X, X, torch.ones(3)), r"weights have shape \(3,\)"),
    (Batch(X, X, positions=torch.arange(2)), r"positions have shape \(2,\) .* give \(3,\) or \(2, 3\)"),
    (Batch(X, X, positions=torch.tensor([0, 1, 6])), "go from 0 to 6; the model's context has 0 to 5"),
    (Batch(X, X, positions=torch.tensor([-1, 0, 1])), "go from -1 to 1"),
    (Batch(X, X, document_ends=(3,)), "those of one row, and the batch has 2; pack all"),
    (Batch(X[:1], X[:1], document_ends=()), r"ends \(\) do not cut 3 tokens"),
    (Batch(X[:1], X[:1], document_ends=(1, 2)), "of which the last is 3"),
    (Batch(X[:1], X[:1], document_ends=(2, 2, 3)), "give increasing ends"),
    (Batch(X[:1], X[:1], document_ends=(0, 3)), "give increasing ends"),
])
def test_a_batch_that_contradicts_itself_is_refused(batch, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_batch(batch, context=6)
