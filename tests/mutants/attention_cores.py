"""Known-wrong attention cores: masks of a block, documents, log-sum-exp, gradients of a part of the keys.

`attend` is (y, lse, dq, dk, dv) of the library's sdpa core under one of MASKS; a mutant of the library is
patched in. The oracle is a softmax over all pairs, by autograd.
"""
import torch

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model import attention_cores
from nanoinfra.model.attention_cores import sdpa_attention
from nanoinfra.model.attention_mask import AttentionMask, additive_mask, mask_kind, split_by_document

cores = Check("cores")
T = 6
BLOCKS = {                                   # of T queries and T keys
    "diagonal": AttentionMask(), "window": AttentionMask(window=3),
    "earlier": AttentionMask(first_positions=(9, 3)), "later": AttentionMask(first_positions=(3, 9)),
    "overlapping": AttentionMask(first_positions=(3, 5)),
    "alibi": AttentionMask(alibi_slopes=(0.5, 0.25), first_positions=(9, 3))}
DOCUMENTS = {"documents": AttentionMask(document_ends=(2, 6)),
             "documents of a block": AttentionMask(first_positions=(4, 2), document_ends=(3, 6, 20))}
MASKS = BLOCKS | DOCUMENTS


def draw():
    draws = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 2, T, 4, generator=draws, dtype=torch.float64)


def attend(name):
    """The gradients come by halves of the keys, each told the whole's output and log-sum-exp."""
    (q, k, v, dy), mask = draw(), MASKS[name]
    y, lse = sdpa_attention.forward(q, k, v, mask)
    query, key = mask.first_positions or (0, 0)
    parts = [sdpa_attention.backward(dy, q, k[:, :, begin:begin + 3], v[:, :, begin:begin + 3], y, lse,
                                     mask._replace(first_positions=(query, key + begin))) for begin in (0, 3)]
    (dq, *first), (more, *second) = parts
    return y, lse, dq + more, *(torch.cat(pair, 2) for pair in zip(first, second))


def oracle(name):
    """The same by a softmax over all pairs; what sees nothing has y 0, lse -inf and gradients 0."""
    *leaves, dy = draw()
    (q, k, v), mask = (x.requires_grad_() for x in leaves), MASKS[name]
    queries, keys = (torch.arange(first, first + T) for first in mask.first_positions or (0, 0))
    ahead = keys - queries[:, None]                                       # (T, T)
    document = [sum(positions >= end for end in mask.document_ends or (99,)) for positions in (queries, keys)]
    seen = (ahead <= 0) & (ahead > -(mask.window or 99)) & (document[0][:, None] == document[1])
    scores = q @ k.mT / 2 + torch.tensor(mask.alibi_slopes or (0.0, 0.0))[:, None, None] * ahead
    powers = scores.exp() * seen
    total = powers.sum(-1)
    y = powers / total.clamp(min=1e-300).unsqueeze(-1) @ v
    return y, total.log(), *torch.autograd.grad(y, (q, k, v), dy)


def compare(subject, names):
    for name in names:
        for what, got, want in zip(("y", "lse", "dq", "dk", "dv"), subject(name), oracle(name)):
            off = (got.nan_to_num(neginf=-1e3) - want.nan_to_num(neginf=-1e3)).abs().max()
            if not off < 1e-10:
                raise CriterionNotMet(f"{what} of {name} is off by {off:.1e}")


@cores.criterion("a block of queries and keys is attended to by position", "property")
def _(subject):
    compare(subject, BLOCKS)


@cores.criterion("a packed document sees itself alone", "property")
def _(subject):
    compare(subject, DOCUMENTS)


def aligned_at_the_start(mask, T, S):
    return mask_kind(mask._replace(first_positions=None), T, S)


def by_index(mask, *args):
    return additive_mask(mask._replace(first_positions=None), *args)


def in_one_piece(mask, T, S):
    return [(slice(0, T), slice(0, S), mask._replace(document_ends=None))]


def from_position_0(mask, T, S):
    return [(*spans, part._replace(first_positions=(0, 0))) for *spans, part in split_by_document(mask, T, S)]


def of_the_part(dy, q, k, v, y, lse, mask, right=attention_cores._flash_backward):
    return right(dy, q, k, v, *attention_cores._flash_forward(q, k, v, mask), mask)


PLACES, APART = (c.name for c in cores.criteria)
VARIANTS = {
    "any square block is a diagonal": ("mask_kind", aligned_at_the_start, PLACES),
    "masks and ALiBi count by index": ("additive_mask", by_index, PLACES),
    "what sees nothing has a log-sum-exp": ("every_query_sees_itself", lambda *_: True, PLACES),
    "a part's gradient is by its own log-sum-exp": ("_flash_backward", of_the_part, PLACES),
    "documents see one another": ("split_by_document", in_one_piece, APART),
    "each document's keys begin where its queries do": ("split_by_document", from_position_0, APART),
}
HOME = "nanoinfra.model.attention_cores"
MUTANTS = [Mutant(name, cores, patched(attend, f"{HOME}:{target}", wrong), rejected_by)
           for name, (target, wrong, rejected_by) in VARIANTS.items()]
