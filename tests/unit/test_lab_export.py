"""Exported checkpoints, read back by the lab and by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from vllm_sluice.lab.corpus import train_tokenizer
from vllm_sluice.lab.export import as_exported, export, load
from vllm_sluice.lab.reference import reference_model, reference_trace
from vllm_sluice.lab.twin import Trace, Twin, TwinConfig

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n"
GATES = ["none", "head", "element"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 40, 300)


@pytest.fixture(scope="module")
def twins():
    built = {}
    for gate in GATES:
        torch.manual_seed(1)
        twin = Twin(
            TwinConfig(
                vocab_size=300, hidden_size=32, layers=3, heads=2, intermediate_size=48, context=64, gate=gate,
                rope_theta=5000.0, norm_eps=1e-5, initializer_range=0.2,
            )
        )  # fmt: skip
        for name, parameter in twin.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else -1.0, std=0.5)
        built[gate] = twin
    return built


@pytest.fixture(scope="module")
def folders(twins, tokenizer, tmp_path_factory):
    base = tmp_path_factory.mktemp("export")
    for gate, twin in twins.items():
        export(twin, tokenizer, base / gate, f"# card of {gate}\n")
    return {gate: base / gate for gate in GATES}


@pytest.fixture
def ids():
    return torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("gate", GATES)
def test_load_gives_back_the_rounded_twin(gate, twins, folders):
    loaded, rounded = load(folders[gate]), as_exported(twins[gate])
    assert loaded.config == twins[gate].config
    assert loaded.state_dict().keys() == rounded.state_dict().keys()
    for name, tensor in rounded.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_as_exported_rounds_a_copy(twins):
    before = twins["head"].lm_head.weight.clone()
    rounded = as_exported(twins["head"])
    assert torch.equal(twins["head"].lm_head.weight, before)
    assert torch.equal(rounded.lm_head.weight, before.bfloat16().float())
    assert not torch.equal(rounded.lm_head.weight, before)


@pytest.mark.parametrize("gate", GATES)
def test_files_and_tensors_of_a_checkpoint(gate, folders):
    assert {file.name for file in folders[gate].iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip
    assert (folders[gate] / "README.md").read_text() == f"# card of {gate}\n"
    tensors = load_file(folders[gate] / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    gates = {name: list(tensor.shape) for name, tensor in tensors.items() if ".output_gate." in name}
    rows = {"none": None, "head": 2, "element": 32}[gate]
    expected = {}
    for layer in range(3 if rows else 0):
        expected[f"model.layers.{layer}.self_attn.output_gate.weight"] = [rows, 32]
        expected[f"model.layers.{layer}.self_attn.output_gate.bias"] = [rows]
    assert gates == expected


@pytest.mark.parametrize("gate", GATES)
def test_config_as_transformers_reads_it(gate, folders):
    config = AutoConfig.from_pretrained(folders[gate])
    assert (config.model_type, config.architectures, config.dtype) == ("llama", ["LlamaForCausalLM"], torch.bfloat16)
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (2, 16, 64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, False)
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert getattr(config, "sluice_gate", None) == (None if gate == "none" else {"granularity": gate})
    generation = GenerationConfig.from_pretrained(folders[gate])
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)


@pytest.mark.parametrize("text", [TEXT, "", "  two  blanks\n\nünïcode 你好", "<s>"])
def test_auto_tokenizer_puts_bos_first_and_agrees_with_the_trained_one(text, folders, tokenizer):
    auto = AutoTokenizer.from_pretrained(folders["head"])
    found = auto(text)["input_ids"]
    assert found[0] == auto.bos_token_id == 0
    assert found == tokenizer.encode(text).ids
    assert auto.decode(found[1:], skip_special_tokens=False) == text
    assert (auto.eos_token_id, auto.model_max_length) == (1, 64)


@pytest.mark.parametrize("gate", GATES)
def test_reference_logits_equal_the_twins(gate, folders, ids):
    twin = load(folders[gate])
    with torch.no_grad():
        expected = twin(ids)
    found = reference_trace(reference_model(folders[gate]), ids).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_reference_trace_equals_the_twins(gate, folders, ids):
    twin, expected = load(folders[gate]), Trace()
    with torch.no_grad():
        twin(ids, expected)
    found = reference_trace(reference_model(folders[gate]), ids)
    for name in ("hidden", "attention", "gate"):
        ours, theirs = getattr(expected, name), getattr(found, name)
        assert len(ours) == len(theirs) == (0 if (name, gate) == ("gate", "none") else 3), name
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape, name
            assert (a - b).abs().max() <= 1e-5, name


@pytest.mark.parametrize("gate", ["head", "element"])
def test_reference_without_its_gate_is_the_ungated_model(gate, twins, folders, ids):
    found = reference_trace(reference_model(folders[gate], gate_enabled=False), ids)
    ungated = Twin(TwinConfig(**{**vars(twins[gate].config), "gate": "none"}))
    ungated.load_state_dict(load(folders[gate]).state_dict(), strict=False)
    with torch.no_grad():
        assert (found.logits - ungated(ids)).abs().max() <= 1e-5
    assert found.gate == []
    assert not torch.allclose(found.logits, reference_trace(reference_model(folders[gate]), ids).logits, atol=0.1)


def test_reference_takes_one_row_and_leaves_no_hooks(folders):
    model = reference_model(folders["head"])
    first, again = (reference_trace(model, [0, 5, 7, 9]) for _ in range(2))
    assert torch.equal(first.logits, again.logits)
    assert (first.logits.shape, len(first.hidden), len(first.gate)) == ((1, 4, 300), 3, 3)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_reference_gates_while_generating_with_a_cache(folders):
    model = reference_model(folders["head"])
    prompt = torch.tensor([[0, 5, 7, 9]])
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)[
        0
    ].tolist()
    grown = prompt[0].tolist()
    while len(grown) < len(found):
        grown.append(reference_trace(model, grown).logits[0, -1].argmax().item())
    assert found == grown


def test_reference_in_bfloat16_is_close_to_float32(folders, ids):
    found = reference_trace(reference_model(folders["head"], torch.bfloat16), ids)
    expected = reference_trace(reference_model(folders["head"]), ids)
    assert found.logits.dtype == torch.bfloat16
    assert found.gate[0].dtype == torch.float32
    # bfloat16 keeps 8 bits: about 1/256 a rounding, and a few of them in a row.
    assert (found.logits.float() - expected.logits).abs().max() < 0.05 * expected.logits.abs().max()


def copy_of(folder, target, **config):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    stored = json.loads((target / "config.json").read_text()) | config
    stored = {key: value for key, value in stored.items() if value is not None}
    (target / "config.json").write_text(json.dumps(stored))
    return target


def test_load_of_another_folder_says_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*config\.json: .* Name the folder of an exported twin"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "model_type is 'qwen3', a twin has 'llama'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, a twin has 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 2.0}}, "rope_parameters is"),
        ({"rope_parameters": None}, "lacks 'rope_parameters', so this is not an exported twin"),
        (
            {"sluice_gate": {"granularity": "layer"}},
            "sluice_gate.granularity is 'layer', a twin has 'head' or 'element'",
        ),
    ],
)
def test_load_of_another_model_names_the_difference(change, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(copy_of(folders["head"], tmp_path / "other", **change))


def test_load_refuses_a_gate_that_the_config_does_not_declare(folders, tmp_path):
    folder = copy_of(folders["head"], tmp_path / "other", sluice_gate=None)
    with pytest.raises(ValueError, match=r"does not fit its config.json: .*output_gate.*expected no such tensor"):
        load(folder)


def test_a_declared_gate_that_is_missing_is_refused_by_both_readers(folders, tmp_path):
    folder = copy_of(folders["none"], tmp_path / "other", sluice_gate={"granularity": "head"})
    with pytest.raises(ValueError, match=r"output_gate\.bias missing"):
        load(folder)
    with pytest.raises(ValueError, match=r"do not fit its config.json: .*missing_keys.*output_gate"):
        reference_model(folder)


def test_tensors_that_the_config_does_not_ask_for_are_refused_by_the_reference(folders, tmp_path):
    folder = copy_of(folders["head"], tmp_path / "other", sluice_gate=None)
    with pytest.raises(ValueError, match=r"unexpected_keys.*output_gate"):
        reference_model(folder)


def test_damaged_weights_are_named(folders, tmp_path):
    folder = copy_of(folders["head"], tmp_path / "other")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"cannot read the weights .*model\.safetensors"):
        load(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load(folder)


def test_export_refuses_a_tokenizer_that_is_not_the_twins(twins, tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 310 tokens, the twin 300"):
        export(twins["none"], train_tokenizer("".join(map(chr, range(32, 900))) * 9, 310), tmp_path / "x", "")
    bare = train_tokenizer(TEXT * 40, 290)
    bare.post_processor = None
    with pytest.raises(
        ValueError, match=r"starts a text with \[\d+\]; a twin needs 0, 1 and \[0\]\. Use the tokenizer"
    ):
        export(twins["none"], bare, tmp_path / "x", "")
    assert not (tmp_path / "x").exists()
