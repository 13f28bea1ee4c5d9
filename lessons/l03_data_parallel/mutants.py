"""Known-wrong data parallelism: each has one mistake that a check must find."""
import torch
import torch.nn.functional as F

from lessons.l03_data_parallel import checks as check
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.lab.mutants import Mutant
from nanoinfra.parallel.data_parallel import pack_grad_buckets
from nanoinfra.train.loss import count_valid_tokens


def own_count(batches):
    return max(1, sum(batch.num_valid_targets for batch in batches))


def nats(model, batch, reduction="sum"):
    return F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(),
                           ignore_index=IGNORE_INDEX, reduction=reduction)


def backward(model, batches, count):
    for batch in batches:
        (nats(model, batch) / count).backward()


def summed(model, axis, reduce=comm.all_reduce):
    for p in model.parameters():
        reduce(p.grad, axis)
    return {name: p.grad for name, p in model.named_parameters()}


def never_sends(model, batches, axis):
    backward(model, batches, *count_valid_tokens(batches, axis))
    return {name: p.grad for name, p in model.named_parameters()}


def divides_by_its_own_count(model, batches, axis):
    backward(model, batches, own_count(batches))
    return summed(model, axis)


def takes_the_mean_of_means(model, batches, axis):
    backward(model, batches, own_count(batches))
    return {name: grad / axis.size for name, grad in summed(model, axis).items()}


def takes_the_mean_of_each_micro_batch(model, batches, axis):
    for batch in batches:
        (nats(model, batch, "mean") / len(batches) / axis.size).backward()
    return summed(model, axis)


def averages(model, batches, axis):
    backward(model, batches, *count_valid_tokens(batches, axis))
    return {name: grad / axis.size for name, grad in summed(model, axis).items()}


def forgets_all_but_the_last_micro_batch(model, batches, axis):
    backward(model, batches[-1:], *count_valid_tokens(batches, axis))
    return summed(model, axis)


def sums_in_float32(model, batches, axis):
    backward(model, batches, *count_valid_tokens(batches, axis))
    return summed(model, axis, lambda grad, axis: grad.copy_(comm.all_reduce(grad.float(), axis)))


def sends_every_micro_batch(model, batches, axis):
    [count], total = count_valid_tokens(batches, axis), {}
    for batch in batches:
        model.zero_grad()
        (nats(model, batch) / count).backward()
        total = {name: total.get(name, 0) + grad for name, grad in summed(model, axis).items()}
    return total


def sends_one_flat_tensor(model, batches, axis):
    backward(model, batches, *count_valid_tokens(batches, axis))
    flat = comm.all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis)
    parts = flat.split([p.numel() for p in model.parameters()])
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts)}


def overlapped(model, batches, axis, bucket_bytes, full=lambda bucket: not bucket.params_awaiting_grad,
               when=lambda last: last, wait_in_hook=False, wait=True, after=False,
               size=lambda given: given, count=count_valid_tokens):
    """The right one, with a place for each slip."""
    params = dict(model.named_parameters())
    parts = pack_grad_buckets(list(params.items())[::-1], size(bucket_bytes), None)
    home = {p: bucket for bucket in parts for p in bucket.grad_views}
    [total], last = count(batches, axis), False

    def launch(bucket):
        bucket.async_all_reduce = comm.all_reduce(bucket.flat_grads, axis, async_op=True)
        if wait_in_hook:
            bucket.async_all_reduce.wait()

    def arrive(p):
        bucket = home[p]
        bucket.grad_views[p].add_(p.grad)
        p.grad = None
        bucket.params_awaiting_grad.discard(p)
        if when(last) and full(bucket) and not bucket.async_all_reduce and not after:
            launch(bucket)

    hooks = [p.register_post_accumulate_grad_hook(arrive) for p in home]
    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        for bucket in parts:
            bucket.params_awaiting_grad = set(bucket.grad_views)
        (nats(model, batch) / total).backward()
    for hook in hooks:
        hook.remove()
    for bucket in parts if after else ():
        launch(bucket)
    for bucket in parts if wait else ():
        bucket.async_all_reduce.wait()
    return {name: home[p].grad_views[p] for name, p in params.items()}


def never_waits(*args):
    return overlapped(*args, wait=False)


def sends_nothing(*args):
    model, batches, axis, _ = args
    return never_sends(model, batches, axis)


def leaves_with_the_first_gradient(*args):
    return overlapped(*args, full=lambda bucket: True, wait_in_hook=True)


def leaves_in_the_first_micro_batch(*args):
    return overlapped(*args, when=lambda last: True, wait_in_hook=True)


def counts_its_own_tokens(*args):
    return overlapped(*args, count=lambda batches, axis: [own_count(batches)])


def has_a_bucket_a_parameter(*args):
    return overlapped(*args, size=lambda given: 0)


def has_one_bucket(*args):
    return overlapped(*args, size=lambda given: 1 << 30)


def sends_after_backward(*args):
    return overlapped(*args, after=True)


def waits_in_the_hook(*args):
    return overlapped(*args, wait_in_hook=True)


ALIKE, ONE, ONCE = (criterion.name for criterion in check.summed_gradients.criteria)
WAITS, ALIKE_TOO, ONE_TOO, BUCKETS, LEAVE, HIDDEN = (c.name for c in check.overlapped_gradients.criteria)
SUMMED = {never_sends: ALIKE, divides_by_its_own_count: ONE, takes_the_mean_of_means: ONE,
          takes_the_mean_of_each_micro_batch: ONE, averages: ONE, forgets_all_but_the_last_micro_batch: ONE,
          sums_in_float32: ONE, sends_every_micro_batch: ONCE, sends_one_flat_tensor: ONCE}
OVERLAPPED = {never_waits: WAITS, sends_nothing: ALIKE_TOO, leaves_with_the_first_gradient: ALIKE_TOO,
              leaves_in_the_first_micro_batch: ALIKE_TOO, counts_its_own_tokens: ONE_TOO,
              has_a_bucket_a_parameter: BUCKETS, has_one_bucket: BUCKETS, sends_after_backward: LEAVE,
              waits_in_the_hook: HIDDEN}
MUTANTS = [Mutant(variant.__name__.replace("_", " "), judge, variant, rejected_by)
           for judge, variants in ((check.summed_gradients, SUMMED), (check.overlapped_gradients, OVERLAPPED))
           for variant, rejected_by in variants.items()]
