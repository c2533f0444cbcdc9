"""The only module that touches the names of vLLM's internals.

Everything here was checked against vLLM 0.32; file and symbol of each dependency stand beside it. Wrappers are
installed once per process (a marker on the wrapped function) and keep the original's signature.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

TESTED_VLLM = "0.32"
_MARK = "_sluice_wrapped"

logger = logging.getLogger("vllm.sluice")
"""Below vLLM's own logger, so that messages reach the server's log in its format."""


# ------------------------------------------------------------------------------------------------ versions
def vllm_version() -> str:
    """Return the version of the installed vLLM, whatever its distribution is called."""
    import vllm

    return str(vllm.__version__)


def run_command(arguments: list[str]) -> None:
    """Run the `vllm` command in this process (entrypoints/cli/main.py)."""
    import sys

    sys.argv = ["vllm", *arguments]
    from vllm.entrypoints.cli.main import main

    main()


def offline_engine(model: str, options: Sequence[str]) -> Any:
    """Build vLLM's `LLM` (entrypoints/llm.py) on a model, eager and without prefix cache unless the options say else.

    `options` are those of `vllm serve`. A wrong one ends the process with status 2, as argparse does.
    """
    from vllm import LLM, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="options of vLLM"))
    arguments = ["--model", model, "--enforce-eager", "--no-enable-prefix-caching", *options]
    return LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(arguments)))


def is_tested_version(version: str) -> bool:
    """Tell whether Sluice was tested with this vLLM version."""
    return version == TESTED_VLLM or version.startswith(TESTED_VLLM + ".")


# ------------------------------------------------------------------------------------------------ wrapping
def _wrap(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = owner.__dict__[name] if name in owner.__dict__ else getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def on_compile_hash(fingerprint: Callable[[], str]) -> None:
    """Append `fingerprint()` to vLLM's compile-cache key (config/vllm.py, VllmConfig.compute_hash).

    vLLM's key does not see what a plugin changes in a loaded model: without this a patched server would load the
    artifacts of the unpatched model and silently serve it, and the other way round.
    """
    from vllm.config import VllmConfig

    def make(original: Callable[..., str]) -> Callable[..., str]:
        def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
            plain = original(self, *args, **kwargs)
            ours = fingerprint()
            return f"{plain}{ours}" if ours else plain

        return compute_hash

    _wrap(VllmConfig, "compute_hash", make)


@dataclass(frozen=True)
class Load:
    """One load of the served model.

    Attributes
    ----------
    vllm_config
        vLLM's own configuration object.
    """

    vllm_config: Any

    @property
    def hf_config(self) -> Any:
        """Hugging Face configuration of the model."""
        return self.vllm_config.model_config.hf_config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model is served in."""
        dtype: torch.dtype = self.vllm_config.model_config.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return torch.device(self.vllm_config.device_config.device)

    @property
    def hidden_size(self) -> int:
        """Width of the language model's hidden state."""
        return int(self.vllm_config.model_config.get_hidden_size())

    @property
    def layers(self) -> int:
        """Number of decoder layers of the whole model; 0 if its configuration does not say."""
        return int(getattr(self.hf_config.get_text_config(), "num_hidden_layers", 0) or 0)

    @property
    def context_parallel(self) -> bool:
        """Tell whether one sequence is spread over several ranks."""
        parallel = self.vllm_config.parallel_config
        names = ("decode_context_parallel_size", "prefill_context_parallel_size")
        return any(int(getattr(parallel, name, 1) or 1) > 1 for name in names)

    @property
    def served_name(self) -> str:
        """Name of the model as vLLM labels it in its own metrics."""
        name = self.vllm_config.model_config.served_model_name
        return str(name[0] if isinstance(name, list) else name)

    @property
    def engine(self) -> str:
        """Data-parallel index (dense models run one independent engine per index)."""
        return str(self.vllm_config.parallel_config.data_parallel_index)

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of one forward pass."""
        return int(self.vllm_config.scheduler_config.max_num_batched_tokens)

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline-parallel stages."""
        return int(self.vllm_config.parallel_config.pipeline_parallel_size)

    @property
    def uses_runner_v2(self) -> bool:
        """Tell whether vLLM's second model runner drives the model."""
        return bool(self.vllm_config.use_v2_model_runner)

    @property
    def microbatches(self) -> bool:
        """Tell whether a forward pass may be split into microbatches."""
        return bool(getattr(self.vllm_config.parallel_config, "use_ubatching", False))

    @property
    def rows_problem(self) -> str | None:
        """Say why the rows of each request are not known around a forward pass, or None if they are."""
        if self.uses_runner_v2:
            return "vLLM's model runner V2 is not supported yet; start with VLLM_USE_V2_MODEL_RUNNER=0"
        if self.microbatches:
            return "dual-batch overlap splits a batch in ways that are not followed"
        if self.context_parallel:
            return "context parallelism spreads a sequence and its KV cache over ranks"
        return None

    @property
    def folds_constants(self) -> bool:
        """Tell whether Inductor would fold buffers into the graph, so that a switch would have no effect.

        On the CPU, max_autotune without AOT compilation sets `freezing` (v1/worker/cpu_model_runner.py,
        _set_global_compilation_settings).
        """
        from vllm import envs

        compilation = self.vllm_config.compilation_config
        autotune = bool((compilation.inductor_compile_config or {}).get("max_autotune"))
        on_cpu = self.vllm_config.device_config.device_type == "cpu"
        return on_cpu and autotune and not envs.VLLM_USE_AOT_COMPILE

    def rank(self) -> str:
        """Name this worker's place in its engine, such as `pp0-tp1`."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        return f"pp{get_pp_group().rank_in_group}-tp{get_tp_group().rank_in_group}"

    def token_texts(self) -> list[str]:
        """Decode every id of the model's tokenizer on its own.

        Raises
        ------
        Exception
            Whatever the tokenizer raises; not every model has one.
        """
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
        return [tokenizer.decode([index]) for index in range(len(tokenizer))]


def on_load_model(before: Callable[[Load], None], after: Callable[[nn.Module, Load], None]) -> None:
    """Call `before` and `after` around every load of a served model, draft models excepted.

    All loaders inherit BaseModelLoader.load_model (model_executor/model_loader/base_loader.py); drafters load under
    another model tag (compilation/backends.py, set_model_tag).
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def make(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def load_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
            from vllm.compilation import backends

            if backends.model_tag != "backbone":
                return original(self, vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            load = Load(vllm_config)
            before(load)
            model = original(self, vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            after(model, load)
            return model

        return load_model

    _wrap(BaseModelLoader, "load_model", make)


WeightStream = Generator[tuple[str, torch.Tensor], None, None]


def on_checkpoint_weights(divert: Callable[[str, torch.Tensor], bool]) -> None:
    """Offer every checkpoint tensor to `divert` first; those that it takes never reach the model.

    Wraps DefaultModelLoader.get_all_weights (model_executor/model_loader/default_loader.py); vLLM refuses tensor
    names that the model does not know, so gate tensors have to be taken out here.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def make(original: Callable[..., WeightStream]) -> Callable[..., WeightStream]:
        def get_all_weights(self: Any, *args: Any, **kwargs: Any) -> WeightStream:
            for name, tensor in original(self, *args, **kwargs):
                if not divert(name, tensor):
                    yield name, tensor

        return get_all_weights

    _wrap(DefaultModelLoader, "get_all_weights", make)


def add_worker_method(name: str, method: Callable[..., Any]) -> None:
    """Make `method` callable on every worker through `collective_rpc(name)` (v1/worker/worker_base.py)."""
    from vllm.v1.worker.worker_base import WorkerBase

    if name not in WorkerBase.__dict__:
        setattr(WorkerBase, name, method)


def worker_model(worker: Any) -> nn.Module:
    """Return the loaded model of a worker, wrappers removed."""
    model: nn.Module = worker.model_runner.get_model()
    return model


# ------------------------------------------------------------------------------------------------ forward passes
@dataclass(frozen=True)
class Batch:
    """The real tokens of one forward pass; rows 0..tokens-1 of the batch, padding excluded.

    Attributes
    ----------
    tokens
        Number of real tokens.
    requests
        The engine's name of each request.
    starts
        First row of each request and the end, [requests + 1], int.
    computed
        Tokens of each request already in the KV cache before this pass, [requests], int.
    prompts
        Prompt length of each request, [requests], int.
    generates
        Whether each request gets a token from this pass, [requests], bool; chunks of a prompt before the last get none.
    positions
        Absolute position of each row on the device, [>= tokens], int.
    ids
        Token id of each row on the device, [>= tokens], int; None on a stage that has none.
    attention
        vLLM's attention metadata by layer name.
    arguments
        Returns the extra arguments (`vllm_xargs`) of each request, [requests]; a call, since only some need them.
    """

    tokens: int
    requests: list[str]
    starts: np.ndarray
    computed: np.ndarray
    prompts: np.ndarray
    generates: np.ndarray
    positions: torch.Tensor
    ids: torch.Tensor | None
    attention: dict[str, Any]
    arguments: Callable[[], list[Mapping[str, Any]]]

    @property
    def prefill_tokens(self) -> int:
        """Tokens of this pass that belong to prompts; the rest are decoded tokens."""
        pending = self.prompts - self.computed
        if (pending <= 0).all():  # the usual pass: all requests decode
            return 0
        return int(np.minimum(np.maximum(pending, 0), np.diff(self.starts)).sum())

    def request_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the request index of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def position_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the absolute position of each row in its sequence."""
        request = self.request_of(rows)
        position: np.ndarray = self.computed[request] + rows - self.starts[request]
        return position


RUNTIME_ATTRIBUTE = "sluice_runtime"
"""Where a loaded model keeps what Sluice runs beside it: an object with `forward(describe, run)`."""


def on_forward() -> None:
    """Route every real forward pass of a model that carries a runtime through `runtime.forward(describe, run)`.

    `describe()` returns the `Batch`, `run()` runs the model.
    Wraps GPUModelRunner._model_forward (v1/worker/gpu_model_runner.py), which the CPU runner inherits: it serves
    real steps only (warm-up, profiling and capture call the model directly), it runs for full CUDA graphs too, and
    vLLM's forward context is set.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            runtime = getattr(self.get_model(), RUNTIME_ATTRIBUTE, None)
            if runtime is None:
                return original(self, *args, **kwargs)
            return runtime.forward(lambda: _batch(self), lambda: original(self, *args, **kwargs))

        return _model_forward

    _wrap(GPUModelRunner, "_model_forward", make)


def on_sample() -> None:
    """Route the sampling of every step through `runtime.sample(logits, run)`; `run()` samples.

    Wraps GPUModelRunner._sample (v1/worker/gpu_model_runner.py). Steps with speculative tokens are left alone.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
            runtime = getattr(self.get_model(), RUNTIME_ATTRIBUTE, None)
            if runtime is None or spec_decode_metadata is not None:
                return original(self, logits, spec_decode_metadata)
            return runtime.sample(logits, lambda: original(self, logits, spec_decode_metadata))

        return _sample

    _wrap(GPUModelRunner, "_sample", make)


def _batch(runner: Any) -> Batch:
    from vllm.forward_context import get_forward_context

    requests = runner.input_batch.num_reqs
    starts = runner.query_start_loc.np[: requests + 1].copy()
    metadata = get_forward_context().attn_metadata
    positions = runner.mrope_positions.gpu[0] if getattr(runner, "uses_mrope", False) else runner.positions
    names = list(runner.input_batch.req_ids[:requests])
    return Batch(
        tokens=int(starts[-1]),
        requests=names,
        starts=starts,
        computed=runner.input_batch.num_computed_tokens_cpu[:requests].copy(),
        prompts=runner.input_batch.num_prompt_tokens[:requests].copy(),
        generates=~runner.discard_request_mask.np[:requests],
        positions=getattr(positions, "gpu", positions),
        ids=runner.input_ids.gpu,
        attention=metadata if isinstance(metadata, dict) else {},
        arguments=lambda: [_arguments(runner.requests[name]) for name in names],
    )


def _arguments(request: Any) -> Mapping[str, Any]:
    arguments: Mapping[str, Any] | None = getattr(request.sampling_params, "extra_args", None)
    return arguments or {}


# ------------------------------------------------------------------------------------------------ model structure
@dataclass(frozen=True)
class AttentionSite:
    """A decoder self-attention block: the module that owns a vLLM `Attention` layer.

    Attributes
    ----------
    path
        Module path of the block, such as `model.layers.0.self_attn`.
    layer
        Index of the decoder layer.
    block, attention
        The owning module and its attention layer.
    attribute
        Name under which the block holds the attention layer.
    heads, head_size
        Query heads of this rank, and the width of a head's output.
    is_mla
        Whether this is multi-head latent attention, whose queries and keys are latent.
    """

    path: str
    layer: int
    block: nn.Module
    attention: Any
    attribute: str
    heads: int
    head_size: int
    is_mla: bool

    @property
    def name(self) -> str:
        """VLLM's name of the attention layer (key of the attention metadata)."""
        return str(self.attention.layer_name)


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """List the decoder self-attention blocks of a model, in layer order.

    Cross-attention and encoder attention are left out (both subclass `Attention`).
    """
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.v1.attention.backend import AttentionType

    modules = dict(model.named_modules())
    sites = []
    for name, module in modules.items():
        if not isinstance(module, (Attention, MLAAttention)):
            continue
        if getattr(module, "attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            continue
        path, _, attribute = name.rpartition(".")
        head_size = getattr(module, "head_size_v", None) or module.v_head_dim
        sites.append(
            AttentionSite(
                path=path,
                layer=layer_index(name),
                block=modules[path],
                attention=module,
                attribute=attribute,
                heads=int(module.num_heads),
                head_size=int(head_size),
                is_mla=isinstance(module, MLAAttention),
            )
        )
    return sorted(sites, key=lambda site: site.layer)


def layer_index(path: str) -> int:
    """Return the decoder layer's index in a module path: its first number."""
    for part in path.split("."):
        if part.isdigit():
            return int(part)
    raise ValueError(f"no layer index in the module path {path!r}")


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the decoder layers of this rank: the innermost module-list entries that hold attention."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    def attends(module: nn.Module) -> bool:
        return any(isinstance(m, AttentionLayerBase) for m in module.modules())

    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for index, layer in enumerate(module):
            nested = any(isinstance(m, nn.ModuleList) and attends(m) for m in layer.modules() if m is not layer)
            if attends(layer) and not nested:
                found.append((f"{name}.{index}", layer))
    return found


def dry_forward(model: nn.Module, load: Load, tokens: int = 4) -> None:
    """Run the model eagerly on `tokens` dummy tokens, without attention metadata: nothing is cached or sampled."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.forward_context import set_forward_context

    device = next(model.parameters()).device
    intermediate = None
    if not get_pp_group().is_first_rank:
        make: Any = model.make_empty_intermediate_tensors
        intermediate = make(batch_size=tokens, dtype=load.dtype, device=device)
    with (
        torch.inference_mode(),
        set_current_vllm_config(load.vllm_config),
        set_forward_context(None, load.vllm_config, num_tokens=tokens, skip_compiled=True),
    ):
        model(
            input_ids=torch.arange(1, tokens + 1, dtype=torch.int32, device=device),  # a padding token's may be all 0
            positions=torch.arange(tokens, device=device),
            intermediate_tensors=intermediate,
            inputs_embeds=None,
        )


def is_last_stage() -> bool:
    """Tell whether this rank holds the end of the model."""
    from vllm.distributed.parallel_state import get_pp_group

    return bool(get_pp_group().is_last_rank)


def tensor_parallel() -> tuple[int, int]:
    """Return this worker's tensor-parallel rank and the number of ranks."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


# ------------------------------------------------------------------------------------------------ changing a forward
ForwardCall = Callable[..., Any]


def override_forward(module: nn.Module, make: Callable[[ForwardCall], ForwardCall]) -> None:
    """Replace a module's forward by `make(original)`, a function of `(self, *args, **kwargs)`.

    Swaps the class, so that isinstance, parameter names and direct calls of `.forward` keep working; where the
    forward is bound to the instance (the Transformers backend's fusers), replaces that.
    """
    if "forward" in module.__dict__:
        bound = module.__dict__["forward"]
        replacement = make(lambda self, *args, **kwargs: bound(*args, **kwargs))
        module.forward = functools.partial(replacement, module)
        return
    base = type(module)
    forward = functools.wraps(base.forward)(make(base.forward))  # keeps the signature for inspection
    module.__class__ = type(f"Sluice{base.__name__}", (base,), {"forward": forward})


def hidden_states_argument(block: nn.Module) -> tuple[int, str]:
    """Return position (without self) and name of the argument that holds an attention block's input.

    Raises
    ------
    LookupError
        If the block's forward has no argument called `hidden_states` or `x`.
    """
    forward = block.__dict__.get("forward") or type(block).forward
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    for wanted in ("hidden_states", "x"):
        if wanted in names:
            return names.index(wanted), wanted
    raise LookupError(f"{type(block).__name__}.forward{tuple(names)} has no argument hidden_states or x")


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation layer, by its class name."""
    return "norm" in type(module).__name__.lower()


# ------------------------------------------------------------------------------------------------ KV cache
@dataclass(frozen=True)
class AttentionShape:
    """What is needed to recompute a layer's attention probabilities.

    Attributes
    ----------
    scale
        Factor of the scores.
    soft_cap
        Scores become `soft_cap * tanh(score / soft_cap)`; 0 for none.
    window
        Visible keys, this token included; 0 for all.
    kv_heads
        Key heads of this rank.
    """

    scale: float
    soft_cap: float
    window: int
    kv_heads: int


def attention_shape(attention: Any) -> AttentionShape:
    """Read the attention arithmetic of a layer.

    Raises
    ------
    NotImplementedError
        If the layer does something that recomputing does not cover; the message names it.
    """
    implementation = attention.impl
    if type(attention).__name__.endswith("ChunkedLocalAttention"):
        raise NotImplementedError("chunked local attention")
    if "flashinfer" in type(implementation).__module__:
        raise NotImplementedError("FlashInfer keeps its block tables inside its wrappers")
    if attention.head_size != getattr(attention, "head_size_v", attention.head_size):
        raise NotImplementedError("keys and values of different width")
    if getattr(implementation, "alibi_slopes", None) is not None:
        raise NotImplementedError("ALiBi slopes")
    if getattr(implementation, "sinks", None) is not None:
        raise NotImplementedError("learned sinks")
    if not hasattr(implementation, "scale"):
        raise NotImplementedError(f"backend {type(implementation).__name__}")
    if str(attention.kv_cache_dtype) not in ("auto", "bfloat16", "float16", "float32"):
        raise NotImplementedError(f"KV cache dtype {attention.kv_cache_dtype}")
    window = getattr(attention, "sliding_window", None)
    return AttentionShape(
        scale=float(implementation.scale),
        soft_cap=float(getattr(implementation, "logits_soft_cap", 0) or 0),
        window=int(window) if window and window > 0 else 0,
        kv_heads=int(attention.num_kv_heads),
    )


def block_size(attention: Any) -> int:
    """Return how many tokens a block of a layer's KV cache holds."""
    return int(attention.kv_cache.shape[2])


def key_size(attention: Any) -> int:
    """Return the width of a layer's queries and keys."""
    return int(attention.head_size)


def block_table(metadata: Any) -> torch.Tensor:
    """Return the KV-cache blocks of each request, [requests, blocks], int."""
    table: torch.Tensor = metadata.block_table
    return table


def cached_keys(attention: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Read keys from the paged KV cache.

    Parameters
    ----------
    attention
        vLLM attention layer, its cache bound.
    blocks
        Block ids, [queries, blocks], int.

    Returns
    -------
    torch.Tensor
        Keys, transposed, [queries, blocks, kv_heads, head_dim, block_size], dtype of the cache.
    """
    cache: torch.Tensor = attention.kv_cache  # logical [blocks, kv_heads, block, 2 * head_dim], v1/kv_cache_layout.py
    _, heads, size, width = cache.shape
    dim = width // 2
    if cache.device.type != "cpu":
        return cache[..., :dim][blocks].transpose(-1, -2)
    packed = cache.view(len(cache), heads, 2, size * dim)[:, :, 0][blocks]  # keys, then values
    order = _packed_order(attention.isa, cache.dtype, size, dim)
    if order is None:
        return packed.view(*blocks.shape, heads, dim, size)
    return packed[..., order].view(*blocks.shape, heads, dim, size)


@functools.cache
def _packed_order(isa: str, dtype: torch.dtype, size: int, dim: int) -> torch.Tensor | None:
    """Return where the CPU backend puts key element (channel, token) inside a block, [dim * size], int64.

    None if channel by channel, as all but the AMX kernels do.

    The CPU kernels pack keys in an order that depends on the instruction set. It is measured rather than known:
    keys that hold their own index are written once with vLLM's own kernel and found again.
    """
    from vllm import _custom_ops as ops

    cache = torch.zeros(1, 1, size, 2 * dim, dtype=dtype)
    key_part, value_part = cache.view(1, 1, 2 * size, dim).chunk(2, dim=2)
    index = torch.arange(size * dim)
    places = torch.zeros(size * dim, dtype=torch.int64)
    for digit in range(3):  # base-256 digits are exact in every cache dtype
        value = (index // 256**digit) % 256
        key = value.view(size, 1, dim).to(dtype)
        cache.zero_()
        ops.cpu_attn_reshape_and_cache(key, key, key_part, value_part, torch.arange(size), isa)
        places += key_part[0, 0].reshape(-1).float().long() * 256**digit
    order = torch.empty_like(places)
    order[places] = index
    order = order.view(size, dim).t().reshape(-1)
    return None if torch.equal(order, index) else order


# ------------------------------------------------------------------------------------------------ requests
Admit = Callable[[str, Mapping[str, Any], str | None, bool], tuple[Mapping[str, Any], str | None]]
_CHECK = "_sluice_check"


def on_request(make_check: Callable[[], Admit]) -> None:
    """Let a check see every request before it reaches the engine: refuse it, or change its arguments and cache salt.

    Each front end (an API server, or an `LLM`) makes one check, called as
    `check(request_id, extra_args, cache_salt, streams)` and returning arguments and salt to use; `streams` holds for
    all but the last part of an input that comes in parts. See `bad_request` for refusing. Wraps InputProcessor
    (v1/engine/input_processor.py), which all APIs go through; cached keys and values are shared by equal prompts of
    equal salt only.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def make_init(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            setattr(self, _CHECK, make_check())

        return __init__

    def make_process(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            before = _arguments(request)
            streams = bool(getattr(request, "resumable", False))
            arguments, request.cache_salt = getattr(self, _CHECK)(
                request.request_id, before, request.cache_salt, streams
            )
            if arguments != before:
                request.sampling_params.extra_args = dict(arguments)
            return request

        return process_inputs

    _wrap(InputProcessor, "__init__", make_init)
    _wrap(InputProcessor, "process_inputs", make_process)


@dataclass(frozen=True)
class OpenAIRequest:
    """A request to the OpenAI API as far as it limits what may be asked for.

    Attributes
    ----------
    arguments
        `vllm_xargs`.
    beam_search, streamed
        Whether it uses vLLM's beam search, and whether the answer comes in parts.
    prompts
        Number of prompts, each of which becomes a request of its own.
    salt
        `cache_salt`.
    """

    arguments: Mapping[str, Any]
    beam_search: bool = False
    streamed: bool = False
    prompts: int = 1
    salt: str | None = None


def on_openai_request(check: Callable[[OpenAIRequest], None]) -> None:
    """Call `check` for every OpenAI request before its answer begins.

    A streamed answer has begun, with status 200, when the input processor sees the request; and beam search drops
    `vllm_xargs`. Wraps the requests' to_sampling_params and to_beam_search_params (entrypoints/openai/*/protocol.py).
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    def make(beam_search: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def checked(original: Callable[..., Any]) -> Callable[..., Any]:
            def to_params(self: Any, *args: Any, **kwargs: Any) -> Any:
                check(
                    OpenAIRequest(
                        arguments=self.vllm_xargs or {},
                        beam_search=beam_search,
                        streamed=bool(self.stream),
                        prompts=_number_of_prompts(self),
                        salt=getattr(self, "cache_salt", None),
                    )
                )
                return original(self, *args, **kwargs)

            return to_params

        return checked

    for request in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        _wrap(request, "to_sampling_params", make(False))
    for request in (CompletionRequest, ChatCompletionRequest):
        _wrap(request, "to_beam_search_params", make(True))


def _number_of_prompts(request: Any) -> int:
    """Count the prompts of a completion request: texts, lists of token ids, and embeddings; chats have one."""
    number = 0
    for prompt in (getattr(request, "prompt", None), getattr(request, "prompt_embeds", None)):
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        number += len(prompt or []) if several else prompt is not None
    return max(number, 1)


Ask = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], str] | None]
Summarise = Callable[[list[dict[str, Any]]], dict[str, Any]]
_TICKETS = "_sluice_tickets"


def on_answer(ask: Ask, summarise: Summarise) -> None:
    """Send the ranks' replies to `sluice_rpc("request", ticket)` back with the answer of a request that asks for them.

    `ask(extra_args)` returns the arguments to use and the request's ticket, or None if it does not ask.
    `summarise(replies)` becomes `kv_transfer_params["sluice"]` of the last output, which the OpenAI API returns where
    the answer is not streamed. All of the request's tokens are computed, whatever the prefix cache holds. Wraps
    AsyncLLM.generate (v1/engine/async_llm.py), behind the API server, and LLMEngine.add_request, abort_request and
    step (v1/engine/llm_engine.py), behind `LLM`.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    def asking(parameters: Any) -> tuple[Any, str] | None:
        asked = ask(getattr(parameters, "extra_args", None) or {})
        if asked is None:
            return None
        parameters = parameters.clone()
        parameters.extra_args = dict(asked[0])
        parameters.skip_reading_prefix_cache = True
        return parameters, asked[1]

    async def with_summary(self: Any, outputs: Any, ticket: str) -> AsyncIterator[Any]:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if output.finished:
                    try:
                        summary = summarise(await EngineClients(self).call("request", ticket))
                    except Exception as error:
                        summary = _no_summary(error)
                    _attach(output, summary)
                yield output

    def make_generate(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
            asked = asking(sampling_params)
            if asked is None:
                return original(self, prompt, sampling_params, *args, **kwargs)
            return with_summary(self, original(self, prompt, asked[0], *args, **kwargs), asked[1])

        return generate

    def make_add(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            asked = asking(params)
            if asked is None:
                return original(self, request_id, prompt, params, *args, **kwargs)
            name = original(self, request_id, prompt, asked[0], *args, **kwargs)
            self.__dict__.setdefault(_TICKETS, {})[request_id] = asked[1]
            return name

        return add_request

    def make_abort(original: Callable[..., Any]) -> Callable[..., Any]:
        def abort_request(self: Any, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
            names = list(request_ids)
            for name in names:
                self.__dict__.get(_TICKETS, {}).pop(name, None)
            return original(self, names, *args, **kwargs)

        return abort_request

    def make_step(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any) -> Any:
            outputs = original(self)
            tickets: dict[str, str] = self.__dict__.get(_TICKETS, {})
            for output in outputs if tickets else ():
                if output.finished and (ticket := tickets.pop(output.request_id, None)):
                    try:
                        summary = summarise(self.collective_rpc("sluice_rpc", args=("request", ticket)))
                    except Exception as error:
                        summary = _no_summary(error)
                    _attach(output, summary)
            return outputs

        return step

    _wrap(AsyncLLM, "generate", make_generate)
    _wrap(LLMEngine, "add_request", make_add)
    _wrap(LLMEngine, "abort_request", make_abort)
    _wrap(LLMEngine, "step", make_step)


def _attach(output: Any, summary: dict[str, Any]) -> None:
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), "sluice": summary}


def _no_summary(error: Exception) -> dict[str, Any]:
    """Say why there is no summary; the answer itself must not be lost."""
    logger.error("sluice: a request's statistics could not be collected", exc_info=error)
    return {"error": f"{type(error).__name__}: {error}"}


def bad_request(message: str, parameter: str) -> Exception:
    """Make the exception that vLLM's API server answers with status 400 (vllm/exceptions.py)."""
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(message, parameter=parameter)
    return error


# ------------------------------------------------------------------------------------------------ the API server
def routes_are_allowed(plugin: str) -> bool:
    """Tell whether VLLM_PLUGINS names a plugin, without which vLLM loads none of its routes (plugins/__init__.py)."""
    from vllm import envs

    return plugin in (envs.VLLM_PLUGINS or [])


def multiprocess_metrics() -> bool:
    """Tell whether /metrics is answered from prometheus_client's multi-process files (v1/metrics/prometheus.py)."""
    import os

    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def server_registry() -> Any:
    """Return the registry behind the server's own /metrics."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()


class EngineClients:
    """All engines behind the client that vLLM gives an endpoint plugin (engine/protocol.py, EngineClient)."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def is_paused(self) -> bool:
        """Tell whether generation is paused, by whomever."""
        return bool(await self._client.is_paused())

    async def pause(self) -> None:
        """Freeze requests in flight; drop all cached keys and values (v1/engine/core.py, pause_scheduler)."""
        await self._client.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        """Go on."""
        await self._client.resume_generation()

    async def call(self, operation: str, state: Any = None) -> list[dict[str, Any]]:
        """Run `sluice_rpc` on all ranks of all engines; without a timeout, which would leave a reply in the queue.

        `EngineClient.collective_rpc` returns the first data-parallel engine's replies only (v1/engine/core_client.py).
        """
        core = self._client.engine_core
        by_engine = await core.call_utility_all_async("collective_rpc", "sluice_rpc", None, [operation, state], None)
        return [reply for replies in by_engine for reply in replies]

    async def label(self, generation: int) -> None:
        """Append the generation to the weight version, which others (trainers) may use too."""
        version = (await self._client.get_weight_version()).partition(";sluice=")[0]
        await self._client.update_weight_version(f"{version};sluice={generation}")

    @property
    def speculates(self) -> bool:
        """Tell whether vLLM decodes with speculative tokens."""
        return self._client.vllm_config.speculative_config is not None

    @property
    def index(self) -> int:
        """Number of this API server, 0 for the first."""
        return int(getattr(self._client.engine_core, "client_index", 0))

    @property
    def ranks(self) -> int:
        """Number of ranks of all engines that this API server talks to."""
        world = int(self._client.vllm_config.parallel_config.world_size)
        return world * len(self._client.engine_core.core_engines)
