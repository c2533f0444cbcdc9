"""A twin as a Hugging Face checkpoint: weights in bfloat16, config, tokenizer and model card.

The folder of the ungated twin is a plain Llama checkpoint. The gated twin's adds the tensors
`model.layers.{i}.self_attn.output_gate.{weight,bias}` and names the gate's granularity as `sluice_gate` in
`config.json`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from vllm_sluice.lab.corpus import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN
from vllm_sluice.lab.twin import Twin, TwinConfig

_FIXED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""What `config.json` says of every twin, and has to say of a checkpoint for it to be one."""


def as_exported(twin: Twin) -> Twin:
    """Return a float32 copy whose weights are rounded to bfloat16: the exported twin's exact values."""
    return copy.deepcopy(twin).to(torch.bfloat16).to(torch.float32)


def export(twin: Twin, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Write a twin as a Hugging Face checkpoint; files of the same names are replaced.

    Parameters
    ----------
    twin
        Model to write, in any dtype; the file holds bfloat16.
    tokenizer
        Tokenizer that puts BOS in front of every text.
    folder
        Where to write; made if it does not exist.
    card
        Text of the model card, Markdown.

    Raises
    ------
    ValueError
        If the tokenizer has more tokens than the twin, or other special tokens than the twin was trained with.
    """
    _check_tokenizer(tokenizer, twin.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in twin.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", _config_json(twin.config))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config_json(twin.config))
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    (folder / "README.md").write_text(card, encoding="utf-8")


def load(folder: Path) -> Twin:
    """Read a checkpoint that `export` wrote, gated or not, as a float32 twin.

    Training-only settings that a checkpoint does not keep (`gate_bias_init`) have their defaults.

    Raises
    ------
    ValueError
        If the folder holds no such checkpoint; the message lists what differs.
    """
    config = _read_config(folder)
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights {weights}: {error}. Export the twin again.") from None
    twin = Twin(config)
    expected = {name: list(tensor.shape) for name, tensor in twin.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        listed = ", ".join(f"{name} {found.get(name, 'missing')}" for name in names[:4])
        raise ValueError(
            f"{weights} does not fit its config.json: {listed}{', ...' if len(names) > 4 else ''}; expected "
            f"{', '.join(str(expected.get(name, 'no such tensor')) for name in names[:4])}. Export the twin again."
        )
    twin.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return twin


def _check_tokenizer(tokenizer: Tokenizer, config: TwinConfig) -> None:
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the twin {config.vocab_size}; "
            "use the tokenizer that the twin was trained with."
        )
    found = (tokenizer.token_to_id(BOS_TOKEN), tokenizer.token_to_id(EOS_TOKEN), tokenizer.encode("a").ids[:1])
    if found != (BOS_ID, EOS_ID, [BOS_ID]):
        raise ValueError(
            f"the tokenizer has {BOS_TOKEN} = {found[0]}, {EOS_TOKEN} = {found[1]} and starts a text with {found[2]}; "
            f"a twin needs {BOS_ID}, {EOS_ID} and [{BOS_ID}]. Use the tokenizer that the twin was trained with."
        )


def _config_json(config: TwinConfig) -> dict[str, Any]:
    gate = {} if config.gate == "none" else {"sluice_gate": {"granularity": config.gate}}
    return {
        **_FIXED,
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.initializer_range,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        **gate,
    }


def _tokenizer_config_json(config: TwinConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }


def _read_config(folder: Path) -> TwinConfig:
    file = folder / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {file}: {error.strerror or error}. Name the folder of an exported twin."
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    gate = stored.get("sluice_gate", {"granularity": "none"})
    try:
        config = TwinConfig(
            vocab_size=stored["vocab_size"],
            hidden_size=stored["hidden_size"],
            layers=stored["num_hidden_layers"],
            heads=stored["num_attention_heads"],
            intermediate_size=stored["intermediate_size"],
            context=stored["max_position_embeddings"],
            gate=gate["granularity"],
            rope_theta=stored["rope_parameters"]["rope_theta"],
            norm_eps=stored["rms_norm_eps"],
            initializer_range=stored["initializer_range"],
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}, so this is not an exported twin; name the folder of one.") from None
    # Grouped key-value heads, scaled rotary positions and the like make a Llama that Twin does not compute.
    expected = _FIXED | {
        "num_key_value_heads": config.heads,
        "head_dim": config.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": BOS_ID,
    }
    wrong = [
        f"{key} is {stored.get(key)!r}, a twin has {value!r}"
        for key, value in expected.items()
        if stored.get(key) != value
    ]
    if config.gate not in ("none", "head", "element"):
        wrong.append(f"sluice_gate.granularity is {config.gate!r}, a twin has 'head' or 'element'")
    if wrong:
        raise ValueError(f"{file} is not that of an exported twin: {'; '.join(wrong)}.")
    return config


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
