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
# After this you can compute, from a model's shape alone, its parameters, the FLOPs of a training step, its
# bytes, and the shortest time it can take. Every later lesson saves one of these, or pays with another.

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
from nanoinfra.formulas.shape import SIZES, ModelConfig, sized
from nanoinfra.lab import draw
from nanoinfra.lab.checks import l00_cost as check
from nanoinfra.lab.compare import compare
from nanoinfra.lab.measure import counted, machine, measure, median, timed
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
    B, T = BATCHES[name]
    larger = 124e6 / sum(p.numel() for p in model.parameters())
    years = 10e9 / (B * T) * times[name].value * larger / 3.156e7
    rows.append((name, f"{B} x {T}", str(times[name]), f"{years:.1f} years"))
Grid(f"a step on one of {machine()}", ("size", "B x T", "a step", "so GPT-2 small takes"), rows)

# %% [markdown]
# The last column guesses at GPT-2 small, 124 million parameters trained on 10 billion tokens, as if time were
# in proportion to parameters. The rows disagree, so it is not. And would GPT-2 xl, with 1.5 billion, fit into
# your memory at all? Waiting for an answer is no plan. We need to *count*.

# %% [markdown]
# ## 2. Predict
# A LLaMA-like decoder: vocabulary V, width C, L layers; H query heads share KV key and value heads (KV ≤ H,
# *grouped-query attention*), each K numbers wide; an MLP of width F. Products have a dot, as H·K; KV is one
# name. A step sees B sequences of T tokens. Some terms below are left to you.
# 1. *Parameters*: Ψ of them, `psi` in code. A layer has the matrices q (C × H·K), k and v, which make only KV
#    heads, and o, back to width C: which shapes have these? Its MLP is a *SwiGLU*, down(SiLU(gate) · up): gate,
#    up and down of C × F each. Two norms have C each. Around the layers stand the embedding (V × C) and a
#    last norm. The head is the embedding again (*tied*), or has weights of its own.
# 2. *FLOPs*. A matrix times a vector takes a multiply and an add for each entry: 2 FLOPs a parameter and
#    token. Backward makes two products for each one of forward, the gradient of the input and that of the
#    weight. So 6 for every parameter *in a matrix product*. The embedding is a look-up. A tied head? A norm?
# 3. *Attention* multiplies activations. Each token's query meets T keys: 2·H·K·T for these scores, a layer
#    and token, forward. Then T values are summed. What do both cost, with backward? A step has L layers and
#    B·T tokens, so this part grows with T². By convention the causal half is not taken off.
# 4. *Bytes*. A weight, its gradient and AdamW's two moments: four float32 numbers of 4 bytes, a parameter.
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
# Commit four numbers for this model and one step: parameters, FLOPs, bytes, and seconds at `peak`. The last
# word is the unit, where "B" is bytes. A prediction counts for being made; you may be wrong.

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
# Where the parameters are in the seven sizes of this course. In nano, 42 % are the vocabulary's; in xl, 5 %.

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
    parts["embedding, positions, head"] = sum(map(parts.pop, ("embedding", "positions", "head")))
shares({f"{name}, {sum(parts.values()) / 1e6:,.2f} M": parts for name, parts in by_part.items()},
       "where the parameters are")

# %% [markdown]
# **Exercise 1: parameters.** Count them for any decoder of the LLaMA family, without biases. H·K need not be
# C. For `sized("test")` the answer is 54,592. Six to ten lines.
#
# The line `%%exercise L00` writes the cell to `work/L00.py`. The checks and `make grade` run that file, and
# it knows nothing of this notebook: whatever the cell uses, even `torch`, it imports itself.

# %% nbgrader={"grade_id": "parameters", "solution": true}
# %%exercise L00
def parameters(config):
    """Number of parameters of a LLaMA-like decoder; a tied head counts once."""
    C, V, L, F = config.width, config.vocab, config.layers, config.hidden
    H, KV, K = config.heads, config.kv_heads, config.head_dim
    ### BEGIN SOLUTION
    attention = 2 * C * H * K + 2 * C * KV * K                     # q and o, k and v
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
    H, KV, K = config.heads, config.kv_heads, config.head_dim
    ### BEGIN SOLUTION
    layer = 2 * C * H * K + 2 * C * KV * K + 3 * C * F             # entries of a layer's matrices
    products = 2 * (L * layer + V * C)                             # a token's forward, the head with it
    attention = 2 * 2 * L * H * K * seq                            # q k^T, and the sum of values
    return 3 * (products + attention) * batch * seq
    ### END SOLUTION

# %%
check.train_flops(train_flops)

# %% [markdown]
# ## 4. Read the real one
# The trainer's MFU is made of these. *Recompute* throws away what forward kept and runs it again in backward,
# to save memory (lesson 04): *full* does so for whole layers, *selective* for scores and values alone. The
# equations quoted are the same count in GPT-2's shapes. What do they handle that yours leaves out? Question
# (e) below asks for it.

# %%
print(*map(inspect.getsource, (params.shapes, params.block_shapes, flops.forward_flops, flops.train_flops,
                               flops.mfu)), sep="\n\n")

# %% [markdown]
# ## 5. Measure, compare, explain
# Parameters and bytes are *counted* on the tensors themselves, bytes at the moment before the update. FLOPs
# are counted by torch's counter, which sees every product on its way to the kernel. On the *meta* device
# tensors have shapes and no numbers. It knows plain products only, so attention is written out ("naive").

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
# A miss? Find the term you forgot, predict again and rerun the cell above; the table says which try it was.
# The time is not judged, as no step runs all its products at the peak. Once FLOPs pass, one over the ratio of
# seconds is the **MFU**. Where does the rest go? A *clock* on every operator tells; torch's FLOP counter is
# built in the same way. The clock slows the step, so blue is below the MFU.

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


def clocked(name):
    """Seconds of one step of size `name`, by what they were spent on."""
    begin = time.perf_counter()
    with Clock() as clock:
        trainers[name][-1]()
    total = time.perf_counter() - begin
    products = sum(s for op, s in clock.spent.items() if op == "mm" or "attention" in op)
    best = min(ideal[name], products)
    rest = sum(clock.spent.values()) - products
    return {"products at the peak": best, "products, below the peak": products - best,
            "other operators": rest, "Python, and the clock": total - products - rest}


def budget(name):
    steps = [clocked(name) for _ in range(5)]
    return {part: median([step[part] for step in steps]).value for part in steps[0]}


ideal = {name: flops.train_flops(sized(name), *BATCHES[name]) / peak for name in BATCHES}
shares({f"{name}, MFU {ideal[name] / times[name].value:.0%}": budget(name) for name in BATCHES},
       "a step's time (timed, medians of 5 clocked steps)")

# %% [markdown]
# And where do the FLOPs go? GPT-2 has H·K = KV·K = C, F = 4C and two matrices in its MLP: the four of
# attention have 4C² parameters and these two 8C², so its layers have 12·L·C². At xl's own T of 1024 nearly all
# goes into them, as *6 a parameter* says. But scores and values grow with T. From which T on is that rule
# wrong by a factor of two? Work it out; the next picture marks it.

# %%
xl = sized("xl")
lengths = [2 ** (k / 4) for k in range(32, 69)]                    # 256 to 128 Ki
terms = [flops.forward_flops(xl, round(length)) for length in lengths]
labels = {"head": "head", "mlp": "MLP", "qkvo": "q, k, v, o", "scores": "scores", "values": "values"}
picture, axes = draw.canvas(8.6, 4.2, "GPT-2 xl: where the FLOPs go")
axes.stackplot(lengths, [[t[term] / sum(t.values()) for t in terms] for term in labels], edgecolor="white",
               labels=labels.values(), colors=[draw.PINK, draw.GREEN, draw.BLUE, draw.ORANGE, draw.RED])
axes.axvline(6 * xl.width, color="black", linestyle="--", label="T = 6C")
axes.set_xscale("log", base=2)
axes.set_xticks(lengths[4::4], [f"{length / 1024:g} Ki" for length in lengths[4::4]])
axes.set(xlim=(256, 2**17), ylim=(0, 1), xlabel="tokens in a sequence, T", ylabel="share of the FLOPs")
axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False, reverse=True)
picture

# %% [markdown]
# At T = 6C, 12·L·C·T is 6·12·L·C² (the head adds a little). Now the wall. Train each size on 20 tokens a
# parameter (*Chinchilla*: Hoffmann et al. 2022): here, at your MFU; and on an H100, with its published peak of
# 989 TFLOP/s in bfloat16, at an MFU of 40 %. Nothing in this table was run: it is *modelled*. *States* are
# weights, gradients and moments. Activations need memory too, so states of 99 % do not fit.

# %%
UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "s": 1, "ms": 1e-3}
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def duration(seconds):
    unit = next(unit for unit, size in UNITS.items() if seconds >= size or unit == "ms")
    return f"{float(f'{seconds / UNITS[unit]:.2g}'):,.10g} {unit}"             # two digits


def training(name, size):
    psi, T = params.parameters(size), size.context
    work = flops.train_flops(size, 1, T) / T * 20 * psi
    here = work / peak * times[NAME].value / ideal[NAME]
    return (name, f"{psi:,}", f"{16 * psi / 1e6:,.0f} MB", f"{1600 * psi / memory:,.1f} %", duration(here),
            duration(work / (0.4 * 989e12)))


gpt3 = ModelConfig(50257, 12288, 96, 96, 96, 128, 4 * 12288, 2048, family="gpt2")
sizes = {name: size.model for name, size in SIZES.items()} | {"GPT-3": gpt3}
Grid(f"modelled: this machine, with {memory / 1e9:.0f} GB, and an H100",
     ("size", "parameters", "states", "of this memory", "training, here", "on the H100"),
     [training(name, size) for name, size in sizes.items()])

# %% [markdown]
# **Explain.** Five sentences. (a) Why is MFU below 1? Name the two largest reasons on your machine. (b) Why
# does it grow with the model? (c) Why did the guesses of section 1 disagree? (d) GPT-3 fits on no single
# device. By how much do its states miss 80 GB, and what else needs memory? (e) What do the functions of
# section 4 handle that yours leave out?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) Products of small matrices run below the peak, and operators with hardly any FLOPs (norms, softmax,
# SiLU, additions, AdamW) wait for memory; Python and dispatch come on top. (b) Products cost C² a token and
# the rest costs C, and larger matrices come nearer to the peak. (c) Time is FLOPs over MFU. FLOPs are not in
# proportion to parameters (attention, and norms), and the MFU of the sizes differs. (d) 16 bytes for each of
# 175 billion are 2.8 TB, 35 times 80 GB; what forward keeps for backward comes on top, see lesson 01. (e)
# GPT-2's positions, biases and two-matrix MLP, norms of q and k; causal halves, and recomputation.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Here are counts that are wrong by one slip each, one of them a famous rule, and the criteria of your check,
# in order. The first that a count does not meet rejects it. Guess which catches which.

# %%
mutants = [m for m in collect(file="l00_cost") if m.check is check.train_flops][:: 3 if FAST else 1]
print("counts:", *(mutant.name for mutant in mutants), sep="\n    ")
print("criteria:", *(criterion.name for criterion in check.train_flops.criteria), sep="\n    ")

# %% [markdown]
# Now run. Then grade your own file, `work/L00.py`, from a terminal in the project's folder: `make grade L=00`.

# %%
for mutant in mutants:
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
