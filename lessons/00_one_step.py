# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lesson 00. What one step costs
# **2020** · Kaplan et al., *Scaling laws for neural language models*: six FLOPs a parameter and token.
# **2022** · Chowdhery et al., *PaLM*: attention on top, and MFU, the share of a machine's peak that is used.
#
# **Needs** a CPU. **Time** 60 minutes. **Builds on** nothing; you have seen a transformer and its training.
#
# After this you can compute, from a model's shape alone, its parameters, the FLOPs of a training step, the
# bytes of weights, gradients and optimizer, and the shortest time that a step can take. Every later lesson
# saves one of these, or pays with another.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanoinfra.formulas import flops, params
from nanoinfra.formulas.memory import state_bytes
from nanoinfra.formulas.shape import SIZES, ModelConfig, sized
from nanoinfra.lab import draw
from nanoinfra.lab.checks import l00_cost as check
from nanoinfra.lab.compare import compare
from nanoinfra.lab.measure import counted, machine, measure, timed
from nanoinfra.lab.mutants import collect
from nanoinfra.lab.predict import predict
from nanoinfra.lab.table import Grid
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.init import init_weights
from nanoinfra.train.loss import cross_entropy
from nanoinfra.train.optim import Optimizer

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
BATCHES = {"test": (8, 64), "nano": (2, 128)} | ({} if FAST else {"nano": (4, 256), "micro": (2, 512)})
torch.set_num_threads(1)                     # one core: your browser keeps the others

# %% [markdown]
# ## 1. The wall
# A training step, the whole of it, on one core: B sequences of T tokens, for models of growing size.

# %%
def trainer(name):
    """A model of size `name`, its optimizer, and two functions: one gives gradients, one makes a step."""
    B, T = BATCHES[name]
    model = init_weights(Decoder(sized(name)), seed=0)
    optimizer = Optimizer(model, "adamw")
    x, y = torch.randint(model.config.vocab, (2, B, T))            # (B, T) each: tokens, and the next ones

    def gradients():
        cross_entropy(model.hidden(x), model.head.weight, y, count=B * T).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def step():
        optimizer.step(gradients(), lr=1e-3)                       # also forgets the gradients
    return model, optimizer, gradients, step


trainers = {name: trainer(name) for name in BATCHES}
times, rows = {}, []
for name, (model, _, _, step) in trainers.items():
    times[name] = timed(step)
    psi, (B, T) = sum(p.numel() for p in model.parameters()), BATCHES[name]
    years = 10e9 / (B * T) * times[name].value * 124e6 / psi / 3.156e7
    rows.append((name, f"{B} x {T}", f"{psi:,}", str(times[name]), f"{years:.1f} years"))
Grid(f"a step on {machine()}", ("size", "B x T", "parameters", "a step", "so GPT-2 small takes"), rows)

# %% [markdown]
# The last column guesses at GPT-2 small: 124 million parameters, trained on 10 billion tokens, if time is in
# proportion to parameters. The rows disagree, so that rule is wrong. And would the 1.5 billion parameters of
# GPT-2 xl fit into your memory at all? Waiting for an answer is no plan. We need to *count*.

# %% [markdown]
# ## 2. Predict
# A LLaMA-like decoder: vocabulary V, width C, L layers; H query heads, KV key heads, K numbers in each; an
# MLP of width F.
# 1. *Parameters.* A layer has matrices q, o (C × HK each), k, v (C × KV·K each), gate, up, down (C × F each),
#    and two norms of C. Around them stand the embedding (V × C) and a last norm. The head is the embedding
#    again (*tied*), or has V × C of its own.
# 2. *FLOPs.* A matrix times a vector takes a multiply and an add for each entry: 2 FLOPs a parameter and
#    token. Backward makes two products for each one of forward. So 6, for every parameter *in a product*: the
#    head is one, the embedding is a look-up, and norms do not count.
# 3. *Attention* multiplies activations. Each token's query meets T keys, and T values are summed: 2·2·HK·T a
#    layer and token forward, 12·HK·T with backward. By convention the causal half is not taken off.
# 4. *Bytes.* A weight, its gradient and AdamW's two moments are four numbers: 16 bytes a parameter.
# 5. *Seconds*, at best: FLOPs over the peak, the rate of this machine's fastest matrix product.

# %%
rates = {}
for n in (32, 64, 128, 256, 512, 1024):
    a, b = torch.randn(2, n, n)
    rates[n] = 2 * n**3 / timed(lambda a=a, b=b: a @ b, n=9).value
peak = max(rates.values())
Grid("n x n matrix products, timed, median of 9", ("n", "GFLOP/s", "of the peak"),
     [(str(n), f"{rate / 1e9:.1f}", f"{rate / peak:.0%}") for n, rate in rates.items()])

# %%
NAME = list(BATCHES)[-1]
config, (B, T) = sized(NAME), BATCHES[NAME]
V, C, L, F = config.vocab, config.width, config.layers, config.hidden
H, KV, K = config.heads, config.kv_heads, config.head_dim
print(f"{NAME}: {V=} {C=} {L=} {H=} {KV=} {K=} {F=}, a tied head; a step has {B=} {T=}")

# %% [markdown]
# Commit four numbers for this model and one step: parameters, FLOPs, bytes, and seconds at `peak`. A
# prediction counts for being made; you may be wrong.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L00.parameters", <formula>)
# predict("L00.flops", <formula>, "FLOPs")
# predict("L00.bytes", <formula>, "B")
# predict("L00.seconds", <formula>, "s")
### BEGIN SOLUTION
layer = 2 * C * H * K + 2 * C * KV * K + 3 * C * F
psi = V * C + L * (layer + 2 * C) + C
work = 6 * (L * layer + V * C) * B * T + 12 * L * H * K * T * B * T
predict("L00.parameters", psi)
predict("L00.flops", work, "FLOPs")
predict("L00.bytes", 16 * psi, "B")
predict("L00.seconds", work / peak, "s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# Where the parameters are, from the real shapes of the seven sizes of this course. In a small model, most of
# them only look up words.

# %%
def shares(rows, title):
    """A bar a row of {label: {part: value}}: each part's share."""
    picture, axes = draw.canvas(8.6, 1.3 + 0.42 * len(rows), title)
    for y, parts in enumerate(rows.values()):
        left = 0
        for colour, (part, value) in zip(draw.COLOURS, parts.items()):
            share = value / sum(parts.values())
            axes.barh(y, share, 0.7, left, color=colour, label="" if y else part, edgecolor="white")
            axes.text(left + share / 2, y, f"{share:.0%}" if share > 0.045 else "", ha="center", va="center",
                      color="white", weight="bold", fontsize=9)
            left += share
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


by_part = {name: params.parameters_by_part(size.model) for name, size in SIZES.items()}
for parts in by_part.values():
    parts["embedding"] += parts.pop("positions") + parts.pop("head")
shares({f"{name}, {sum(parts.values()) / 1e6:,.2f} M": parts for name, parts in by_part.items()},
       "where the parameters are")

# %% [markdown]
# **Exercise 1: parameters.** Count them for any decoder of the LLaMA family. `config` has the fields
# `vocab`, `width`, `layers`, `heads`, `kv_heads`, `head_dim`, `hidden`, `tied`. H·K need not be C. There are
# no biases. For `sized("test")` the answer is 54,592. Six to ten lines.

# %% nbgrader={"grade_id": "parameters", "solution": true}
# %%exercise L00
def parameters(config):
    """Number of parameters of a LLaMA-like decoder; a tied head counts once."""
    C, V, L, F = config.width, config.vocab, config.layers, config.hidden
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    ### BEGIN SOLUTION
    attention = 2 * C * queries + 2 * C * keys                     # q and o, k and v
    mlp = 3 * C * F                                                # gate, up, down
    norms = 2 * C
    embedding = V * C
    head = 0 if config.tied else V * C
    return embedding + L * (attention + mlp + norms) + C + head
    ### END SOLUTION


# %%
check.parameters(parameters)

# %% [markdown]
# **Exercise 2: FLOPs of a step.** Forward and backward over `batch` sequences of `seq` tokens. Which
# parameters are in no product? Which product has no parameters? For `sized("test")`, 2 sequences of 24 tokens
# cost 17,989,632. Six to ten lines.

# %% nbgrader={"grade_id": "train_flops", "solution": true}
# %%exercise L00
def train_flops(config, batch, seq):
    """FLOPs of forward and backward: matrix products alone, 2 a multiply-add, attention over all keys."""
    C, V, L, F = config.width, config.vocab, config.layers, config.hidden
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    ### BEGIN SOLUTION
    layer = 2 * C * queries + 2 * C * keys + 3 * C * F             # entries of a layer's matrices
    products = 2 * (L * layer + V * C)                             # a token's forward, the head with it
    attention = 2 * 2 * L * queries * seq                          # q k^T, and the sum of values
    return 3 * (products + attention) * batch * seq
    ### END SOLUTION


# %%
check.train_flops(train_flops)

# %% [markdown]
# ## 4. Read the real one
# The trainer's MFU is made of these. What do they handle that yours leaves out?

# %%
print(*map(inspect.getsource, (flops.forward_flops, flops.train_flops, flops.mfu)), sep="\n\n")

# %% [markdown]
# ## 5. Measure, compare, explain
# Parameters and bytes are *counted* on the tensors themselves, bytes at the moment before the update. FLOPs
# are counted by torch's counter, which sees every product on its way to the kernel. It runs on the *meta*
# device, where tensors have shapes and no numbers, and it knows plain products only, so attention is written
# out ("naive"). Seconds are *timed*.

# %%
model, optimizer, gradients, step = trainers[NAME]
moments = [tensor for name, tensor in optimizer.state().items() if name.startswith("exp_avg")]
held = [*model.parameters(), *gradients().values(), *moments]
with torch.device("meta"), FlopCounterMode(display=False) as counter:
    Decoder(config, attention="naive")(torch.zeros(B, T, dtype=torch.long)).sum().backward()
measure("L00.parameters", lambda: counted(sum(p.numel() for p in model.parameters()), ""))
measure("L00.flops", lambda: counted(counter.get_total_flops(), "FLOPs"))
measure("L00.bytes", lambda: counted(sum(tensor.nbytes for tensor in held), "B"))
times[NAME] = measure("L00.seconds", timed, step)
compare(["L00.parameters", "L00.flops", "L00.bytes", "L00.seconds"], tolerance={"L00.seconds": None})

# %% [markdown]
# The time is not judged: no step runs all its products at the peak. One over the ratio is the **MFU**. Where
# does the rest go? A *clock* on every operator tells; torch's FLOP counter is built in the same way.

# %%
class Clock(TorchDispatchMode):
    """While it is on, adds up the seconds of each operator."""
    def __init__(self):
        super().__init__()
        self.spent = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        begin = time.perf_counter()
        out = op(*args, **(kwargs or {}))
        self.spent[op.overloadpacket.__name__] += time.perf_counter() - begin
        return out


def budget(name):
    """Seconds of one step of size `name`, by what they were spent on."""
    begin = time.perf_counter()
    with Clock() as clock:
        trainers[name][-1]()
    total = time.perf_counter() - begin
    products = sum(s for op, s in clock.spent.items() if op == "mm" or "attention" in op)
    best = min(flops.train_flops(sized(name), *BATCHES[name]) / peak, products)
    rest = sum(clock.spent.values()) - products
    return {"products at the peak": best, "products, below the peak": products - best,
            "other operators": rest, "Python, and the clock": total - products - rest}


def mfu(name):
    B, T = BATCHES[name]
    return flops.mfu(B * T / times[name].value, sized(name), T, peak)


shares({f"{name}, MFU {mfu(name):.0%}": budget(name) for name in BATCHES}, "one step's time (timed)")

# %% [markdown]
# And where do the FLOPs go? In GPT-2 xl, at its own T of 1024, into the matrices, as *6 a parameter* says.
# But scores and values grow with T. From which T on is the rule wrong by a factor of two?

# %%
def flops_by_length(config, title):
    lengths = [2 ** (k / 4) for k in range(32, 69)]                # 256 to 128 Ki
    terms = [flops.forward_flops(config, round(T)) for T in lengths]
    labels = {"head": "head", "mlp": "MLP", "qkvo": "q, k, v, o", "scores": "scores", "values": "values"}
    parts = [[t[term] / sum(t.values()) for t in terms] for term in labels]
    picture, axes = draw.canvas(8.6, 4.2, title)
    axes.stackplot(lengths, parts, labels=labels.values(), edgecolor="white",
                   colors=[draw.PINK, draw.GREEN, draw.BLUE, draw.ORANGE, draw.RED])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths[4::4], [f"{T / 1024:g} Ki" for T in lengths[4::4]])
    axes.set(xlim=(256, 2**17), ylim=(0, 1), xlabel="tokens in a sequence, T", ylabel="share of the FLOPs")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False, reverse=True)
    return picture


flops_by_length(sized("xl"), "GPT-2 xl: where the FLOPs go")

# %% [markdown]
# (From T = 6C and a little for the head: 12·LCT = 6·12·LC².) Now the wall. Train each size on 20 tokens a
# parameter: here, at the MFU that you measured; and on an H100, with its published peak of 989 TFLOP/s in
# bfloat16, at an MFU of 40 %. Nothing in this table was run: it is *modelled*.

# %%
def duration(seconds):
    days = seconds / 86400
    text = f"{days:,.1f} days" if days > 1 else f"{seconds:,.0f} s"
    return f"{days / 365:,.1f} years" if days > 999 else text


gpt3 = ModelConfig(50257, 12288, 96, 96, 96, 128, 4 * 12288, 2048, family="gpt2")
memory, rows = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), []
for name, size in {**{name: size.model for name, size in SIZES.items()}, "GPT-3": gpt3}.items():
    psi, T = params.parameters(size), size.context
    states, work = sum(state_bytes(psi).values()), flops.train_flops(size, 1, T) / T * 20 * psi
    rows.append((name, f"{psi:,}", f"{states / 1e6:,.0f} MB", "yes" if states < memory else "no",
                 duration(work / (peak * mfu(NAME))), duration(work / (0.4 * 989e12))))
Grid(f"modelled: this machine, with {memory / 1e9:.0f} GB, and an H100",
     ("size", "parameters", "16 bytes each", "states fit", "training, here", "on the H100"), rows)

# %% [markdown]
# **Explain.** Four sentences. (a) Why is MFU below 1? Name the two largest reasons on your machine. (b) Why
# does it grow with the model? (c) Why did the guesses of section 1 disagree? (d) GPT-3 fits on no single
# device. By how much do its states miss 80 GB, and what else needs memory?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 4}
# <!-- ### BEGIN SOLUTION -->
# (a) Products of small matrices run below the peak, and operators with hardly any FLOPs (norms, softmax,
# SiLU, additions, AdamW) wait for memory; Python and dispatch come on top. (b) Products cost C² a token and
# the rest costs C, and larger matrices come nearer to the peak. (c) Time is FLOPs over MFU. FLOPs are not in
# proportion to parameters (attention, and norms), and the MFU of the sizes differs. (d) 16 bytes for each of
# 175 billion are 2.8 TB, 35 times 80 GB; what forward keeps for backward comes on top, see lesson 01.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Counts that are wrong by one slip each. Guess which criterion catches which. One is a famous rule.

# %%
mutants = [mutant for mutant in collect(file="l00_cost") if mutant.check is check.train_flops]
for mutant in mutants[::3] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %% [markdown]
# ## 7. What came next
# Published numbers count differently: attention halved or not, recomputation in (*hardware* FLOPs) or out.
# Compare the counts before the numbers. PaLM reached an MFU of 46 % on 6144 chips; good runs on GPUs reach 40
# to 55 %. Lesson 01 asks where the bytes go; later ones spread a step over devices and fight for its MFU.
#
# - Kaplan et al., *Scaling laws for neural language models*, 2020, section 2.1.
# - Chowdhery et al., *PaLM: scaling language modeling with Pathways*, 2022, appendix B.
