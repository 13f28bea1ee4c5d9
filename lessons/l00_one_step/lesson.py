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

from lessons.l00_one_step import checks as check
from nanoinfra.config import MODEL_SIZES, ModelConfig, config_for_size
from nanoinfra.formulas import flops
from nanoinfra.formulas import parameters as params
from nanoinfra.lab import draw
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, describe_machine, measure, median_of_times, timed
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.train.loss import linear_cross_entropy
from nanoinfra.train.optimizer import MixedPrecisionOptimizer

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
    model = init_weights(Decoder(config_for_size(name)), seed=0)
    optimizer = MixedPrecisionOptimizer(model, "adamw")
    x, y = torch.randint(model.config.vocab, (2, B, T))            # (B, T) each: tokens, and the next ones

    def gradients():
        linear_cross_entropy(model.hidden_states(x), model.head.weight, y, num_valid_tokens=B * T).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def step():
        optimizer.step(gradients(), lr=1e-3)                       # also forgets the gradients
    return model, optimizer, gradients, step

trainers = {name: trainer(name) for name in BATCHES}
times, rows = {}, []
for name, (model, _, _, step) in trainers.items():
    times[name] = timed(step)
    own, (B, T) = sum(p.numel() for p in model.parameters()), BATCHES[name]
    years = 10e9 / (B * T) * times[name].value * 124e6 / own / 3.156e7
    rows.append((name, f"{B} x {T}", str(times[name]), f"{years:.1f} years"))
DisplayTable(f"a step on one of {describe_machine()}", ("size", "B x T", "a step", "GPT-2 small takes"), rows)

# %% [markdown]
# The last column guesses at GPT-2 small, 124 million parameters trained on 10 billion tokens, as if time were
# in proportion to parameters. The rows disagree, so it is not. Waiting is no plan: we need to *count*.

# %% [markdown]
# ## 2. Predict
# A LLaMA-like decoder: vocabulary V, width C, L layers; H query heads share KV key and value heads (KV ≤ H,
# *grouped-query attention*), each K numbers wide; an MLP of width F. Products have a dot, as H·K; KV is one
# name. A step sees B sequences of T tokens. Some terms below are left to you.
# 1. *Parameters*: Ψ of them, `psi` in code. A layer has the matrices q (C × H·K), k and v, which make only KV
#    heads, and o, back to width C: what are their shapes? Its MLP is a *SwiGLU*, down(SiLU(gate) · up), where
#    gate, up and down have C × F each. Two norms have C each. Around the layers stand the embedding (V × C)
#    and a last norm. The head is the embedding again (*tied*), or has weights of its own.
# 2. *FLOPs*. A matrix times a vector takes a multiply and an add for each entry: 2 FLOPs a parameter and
#    token. Backward makes two products for each one of forward, the gradient of the input and that of the
#    weight. So 6 for every parameter *in a matrix product*. The embedding is a look-up. A tied head? A norm?
# 3. *Attention* multiplies activations. Each token's query meets T keys: 2·H·K·T for these scores, a layer
#    and token, forward. Then T values are summed. What do both cost, with backward? A step has L layers and
#    B·T tokens, so this part grows with T². By convention the causal half is not taken off.
# 4. *Bytes*. A weight, its gradient and AdamW's two moments: four float32 numbers of 4 bytes, a parameter.
# 5. *Seconds*, at best: FLOPs over the peak, the rate of this machine's fastest matrix product.

# %%
NAME = list(BATCHES)[-1]
config, (B, T) = config_for_size(NAME), BATCHES[NAME]
V, C, L, F = config.vocab, config.width, config.layers, config.hidden
H, KV, K = config.heads, config.kv_heads, config.head_dim
print(f"{NAME}: {V=} {C=} {L=} {H=} {KV=} {K=} {F=}, a tied head; a step has {B=} {T=}")
rates = {}
for n in (32, 64, 128, 256, 512, 1024):
    a, b = torch.randn(2, n, n)
    rates[n] = 2 * n**3 / timed(lambda a=a, b=b: a @ b, n=9).value
peak = max(rates.values())
DisplayTable("n x n matrix products, timed, median of 9", ("n", "GFLOP/s", "of the peak"),
             [(str(n), f"{rate / 1e9:.1f}", f"{rate / peak:.0%}") for n, rate in rates.items()])

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
    picture, axes = draw.new_figure(8.6, 1.3 + 0.42 * len(rows), title)
    for y, parts in enumerate(rows.values()):
        left = 0
        for colour, (part, value) in zip(draw.SERIES_COLOURS, parts.items()):
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

by_part = {name: params.parameter_count_by_part(size.config) for name, size in MODEL_SIZES.items()}
for parts in by_part.values():
    parts["embedding, positions, head"] = sum(map(parts.pop, ("embedding", "positions", "head")))
shares({f"{name}, {sum(parts.values()) / 1e6:,.2f} M": parts for name, parts in by_part.items()},
       "where the parameters are")

# %% [markdown]
# **Exercise 1: parameters.** Count them for any decoder of the LLaMA family, without biases. H·K need not be
# C. For `config_for_size("test")` the answer is 54,592. Four to ten lines. The line `%%exercise L00` writes
# the cell to `work/L00.py`. The checks and `make grade` run that file, and it knows nothing of this notebook:
# whatever the cell uses, even `torch`, it imports itself.

# %% nbgrader={"grade_id": "parameters", "solution": true}
# %%exercise L00
def parameters(config):
    """Number of parameters of a LLaMA-like decoder; a tied head (`config.tied`) counts once."""
    C, V, L, F = config.width, config.vocab, config.layers, config.hidden
    H, KV, K = config.heads, config.kv_heads, config.head_dim
    ### BEGIN SOLUTION
    attention = 2 * C * H * K + 2 * C * KV * K                     # q and o, k and v
    embedding = V * C if config.tied else 2 * V * C                # and the head
    return embedding + L * (attention + 3 * C * F + 2 * C) + C       # the MLP, and norms
    ### END SOLUTION

# %%
check.parameters(parameters)

# %% [markdown]
# **Exercise 2: FLOPs of a step.** Forward and backward over `batch` sequences of `seq` tokens. For
# `config_for_size("test")`, 2 sequences of 24 tokens cost 17,989,632. Four to ten lines.

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
# to save memory (lesson 04): *full* does so for whole layers, *selective* for scores and values. Quoted
# equations are the same count in GPT-2's shapes. What do they handle that yours leaves out? See (e) below.

# %%
print(*map(inspect.getsource, (params.parameter_shapes, params.block_parameter_shapes,
                               flops.forward_flops_per_token, flops.forward_backward_flops,
                               flops.model_flops_utilization)), sep="\n\n")

# %% [markdown]
# ## 5. Measure, compare, explain
# Parameters and bytes are *counted* on the tensors themselves, bytes at the moment before the update. FLOPs
# are counted by torch's counter, which sees every product on its way to the kernel. On the *meta* device
# tensors have shapes and no numbers. It knows plain products only, so attention is written out ("naive").

# %%
model, optimizer, gradients, step = trainers[NAME]
moments = [tensor for name, tensor in optimizer.state_dict().items() if name.startswith("exp_avg")]
held = [*model.parameters(), *gradients().values(), *moments]
with torch.device("meta"), FlopCounterMode(display=False) as counter:
    Decoder(config, attention="naive")(torch.zeros(B, T, dtype=torch.long)).sum().backward()
measure("L00.parameters", lambda: counted(sum(p.numel() for p in model.parameters()), ""))
measure("L00.flops", lambda: counted(counter.get_total_flops(), "FLOPs"))
measure("L00.bytes", lambda: counted(sum(tensor.nbytes for tensor in held), "B"))
times[NAME] = measure("L00.seconds", timed, step)
compare_predictions(list(check.PREDICTIONS), tolerance={"L00.seconds": None})

# %% [markdown]
# A miss? Find the term you forgot, predict again and rerun the cell above; the table says which try it was.
# Time is not judged: no step runs all its products at the peak. Once FLOPs pass, one over the ratio of
# seconds is the **MFU**. Where does the rest go? A *clock* on every operator tells; torch's FLOP counter is
# built in the same way. The clock slows the step, so blue is below the MFU.

# %%
class Clock(TorchDispatchMode):
    """While it is on, adds up the seconds of each operator."""
    def __enter__(self):
        self.spent = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        begin = time.perf_counter()
        out = op(*args, **(kwargs or {}))
        self.spent[op.overloadpacket.__name__] += time.perf_counter() - begin
        return out

def clocked(name):
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
    return {part: median_of_times([step[part] for step in steps]).value for part in steps[0]}

ideal = {name: flops.forward_backward_flops(config_for_size(name), *BATCHES[name]) / peak for name in BATCHES}
shares({f"{name}, MFU {ideal[name] / times[name].value:.0%}": budget(name) for name in BATCHES},
       "a step's time (timed, medians of 5 clocked steps)")

# %% [markdown]
# And where do the FLOPs go? GPT-2 has H·K = KV·K = C, F = 4C and two matrices in its MLP: attention's four
# have 4C² parameters and these two 8C², so L layers have 12·L·C². At xl's own T of 1024 nearly all goes into
# them, as *6 a parameter* says. But scores and values grow with T. From which T on is that rule wrong by a
# factor of two? Work it out; the next picture marks it.

# %%
xl, lengths = config_for_size("xl"), [2 ** (k / 4) for k in range(32, 69)]   # 256 to 128 Ki
terms = [flops.forward_flops_per_token(xl, round(length)) for length in lengths]
order = ("head", "mlp", "qkvo", "scores", "values")
picture, axes = draw.new_figure(8.6, 4.2, "GPT-2 xl: where the FLOPs go")
axes.stackplot(lengths, [[t[term] / sum(t.values()) for t in terms] for term in order], edgecolor="white",
               labels=order, colors=[draw.PINK, draw.GREEN, draw.BLUE, draw.ORANGE, draw.RED])
axes.set_xscale("log", base=2)
axes.set_xticks(lengths[4::4], [f"{length / 1024:g} Ki" for length in lengths[4::4]])
axes.set(xlim=(256, 2**17), ylim=(0, 1), xlabel="tokens in a sequence, T", ylabel="share of the FLOPs")
axes.axvline(6 * xl.width, color="black", linestyle="--", label="T = 6C")
axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False, reverse=True)
picture  # noqa: B018

# %% [markdown]
# At T = 6C, 12·L·C·T is 6·12·L·C² (the head adds a little). Now the wall. Train each size on 20 tokens a
# parameter (*Chinchilla*: Hoffmann et al. 2022): here, at your MFU; and on an H100, at 40 % of its published
# 989 TFLOP/s in bfloat16. Nothing in this table was run: it is *modelled*. *States* are weights, gradients
# and moments. Activations need memory too, so states of 99 % do not fit.

# %%
UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "s": 1, "ms": 1e-3}
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

def duration(seconds):
    unit = next(unit for unit, size in UNITS.items() if seconds >= size or unit == "ms")
    return f"{float(f'{seconds / UNITS[unit]:.2g}'):,.10g} {unit}"             # two digits

def training(name, size):
    psi = params.parameter_count(size)
    work = flops.forward_backward_flops(size, 1, size.context) / size.context * 20 * psi
    return (name, f"{psi:,}", f"{16 * psi / 1e6:,.0f} MB", f"{1600 * psi / memory:,.1f} %",
            duration(work / peak * times[NAME].value / ideal[NAME]), duration(work / (0.4 * 989e12)))

DisplayTable(f"modelled: this machine, with {memory / 1e9:.0f} GB, and an H100",
             ("size", "parameters", "states", "of this memory", "training, here", "on the H100"),
             [*(training(name, size.config) for name, size in MODEL_SIZES.items()),
              training("GPT-3", ModelConfig(50257, 12288, 96, 96, 96, 128, 4 * 12288, 2048, family="gpt2"))])

# %% [markdown]
# **Explain.** Five sentences. (a) Why is MFU below 1? Name the two largest reasons on your machine. (b) Why
# does it grow with the model? (c) Why did the guesses of section 1 disagree? (d) By how much do the states of
# GPT-3 miss 80 GB, an H100's memory? (e) What do the functions of section 4 handle that yours leave out?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) Products of small matrices run below the peak, and operators with hardly any FLOPs (norms, softmax,
# SiLU, additions, AdamW) wait for memory; Python and dispatch come on top. (b) Products cost C² a token, the
# rest costs C, and larger matrices come nearer to the peak. (c) Time is FLOPs over MFU. FLOPs are not in
# proportion to parameters (attention, norms), and MFU differs. (d) 16 bytes for each of 175 billion are 2.8
# TB, 35 times 80 GB. (e) GPT-2's positions, biases and MLP; norms of q and k; causal halves; recomputation.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Counts that are wrong by one slip each, one a famous rule, and the criteria of your check, in order. The
# first that a count does not meet rejects it. Guess which catches which.

# %%
mutants = [m for m in collect_lesson_mutants("00") if m.check is check.train_flops][:: 3 if FAST else 1]
print("counts:", *(mutant.name for mutant in mutants), sep="\n    ")
print("criteria:", *(criterion.name for criterion in check.train_flops.criteria), sep="\n    ")

# %% [markdown]
# Now run. Then grade your own file, `work/L00.py`, from a terminal in this project: `make grade L=00`.

# %%
for mutant in mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %% [markdown]
# ## 7. What came next
# Published numbers count differently: attention halved or not, recomputation in (*hardware* FLOPs) or out.
# PaLM reached an MFU of 46 % on 6144 chips; good runs on GPUs reach 40 to 55 %. Lesson 01 asks where the
# bytes go; later ones spread a step over devices and fight for its MFU.
#
# - Kaplan et al., *Scaling laws for neural language models*, 2020, section 2.1.
# - Chowdhery et al., *PaLM: scaling language modeling with Pathways*, 2022, appendix B.
