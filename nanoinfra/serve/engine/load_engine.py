"""Loading the serving engine of one rank: weights, tokenizer, KV blocks, and on a CPU the kernels in C."""
import sys
from functools import partial

import torch

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.kernels.cpu import decode_kernels
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import parallelize_for_serving
from nanoinfra.serve.command_line_options import EngineOptions
from nanoinfra.serve.engine import cpu_decoder_block, packed_linear
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.train.load_and_export_models import open_pretrained_weights


def load_engine(options: EngineOptions, mesh: Mesh) -> Engine:
    """This rank's engine for `nanoinfra serve`: weights, tokenizer, the KV blocks that --kv-memory holds."""
    weights, dtype = open_pretrained_weights(options.model, mesh.world), getattr(torch, options.dtype)
    block_bytes = options.block_size * kv_cache_bytes_per_token(weights.config, dtype.itemsize, mesh.tp.size)
    num_blocks = options.kv_memory // block_bytes
    if num_blocks < 2:
        raise ValueError(f"--kv-memory {options.kv_memory} holds {num_blocks} blocks of {options.block_size} "
                         f"tokens, {block_bytes} bytes each on a rank; give at least {2 * block_bytes}")
    model = parallelize_for_serving(decoder_on_meta_device(weights.config), mesh, weights.read_parameter,
                                    dtype)
    engine = Engine(model, weights.tokenizer, weights.chat_template, num_blocks=num_blocks,
                    block_size=options.block_size, ledger=mesh.comm_log,
                    max_num_batched_tokens=options.max_num_batched_tokens, max_num_seqs=options.max_num_seqs,
                    max_queued_requests=options.max_queued_requests,
                    max_queued_tokens=options.max_queued_tokens)
    alone_on_cpu = mesh.device == "cpu" and mesh.tp.size == 1 and dtype in packed_linear.PACKED_LINEAR_DTYPES
    report = "torch's operations compute everything"
    if alone_on_cpu:
        report = pack_weights_and_use_c_kernels(engine)
    if mesh.tp.rank == 0:
        print(f"nanoinfra: {report}", file=sys.stderr, flush=True)
    return engine


def pack_weights_and_use_c_kernels(engine: Engine) -> str:
    """On one CPU rank: pack the weights and, where model and machine allow, use kernels compiled from C.

    Returns a sentence that says who computes what now.
    """
    model, dtype = engine.model, engine.model.embed.weight.dtype
    try:
        kernels, why = cpu_decoder_block.compile_kernels_for(model, engine.kv_cache), ""
    except RuntimeError as error:
        kernels, why = None, f", at half the speed: {error}"
    ports = packed_linear.pack_linears(model, kernels and kernels.gemv)
    packed_linear.warm_up_linears(model, engine.scheduler.max_num_batched_tokens,
                                  engine.scheduler.max_num_seqs)
    between = "torch's operations"
    wrapped = next((row for row in ports if len(row.chain) > 1), None)
    if wrapped:
        between = f"torch's operations (the decode kernels would skip {wrapped.chain[0]} at {wrapped.path})"
    elif kernels and cpu_decoder_block.supports_cpu_block(model.config):
        engine.kv_cache = cpu_decoder_block.install_cpu_blocks(model, engine.kv_cache, kernels)
        engine.argmax = partial(decode_kernels.argmax_with_kernels, kernels)
        between = "passes in C"
    reason = packed_linear.why_onednn_cannot_pack(dtype)
    many = f"torch's linear (oneDNN does not pack: {reason})" if reason else "oneDNN's packed weights"
    one = f"C ({kernels.instruction_set().decode()})" if kernels else "the same"
    return f"products of many rows by {many}, of one by {one}, all between by {between}{why}"
