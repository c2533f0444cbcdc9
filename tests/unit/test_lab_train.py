"""Training runs: data cache, interruption, resume."""

import json
from dataclasses import replace

import pytest
import torch

from vllm_sluice.lab.train import Recipe, Run, prepare_data, read_data, read_run
from vllm_sluice.lab.twin import TwinConfig

RECIPE = Recipe(steps=8, rows=2, warmup_steps=2, held_out_bytes=2500)


def tiny(gate="head"):
    return TwinConfig(
        vocab_size=300, hidden_size=16, layers=2, heads=2, intermediate_size=32, context=16, gate=gate, norm_eps=1e-5
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("".join(f"{n} bottles of beer on the wall, take {n % 7} down.\n" for n in range(300)))
    return file


@pytest.fixture(scope="module")
def data(corpus):
    return prepare_data(corpus, corpus.parent / "data", tiny(), RECIPE)


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    Run(folder, tiny(), RECIPE, data).train()
    return folder


def without_seconds(stored):
    return {key: value for key, value in stored.items() if key != "seconds"}


def test_a_run_learns_and_leaves_log_and_loss_curve(uninterrupted):
    (record,) = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert record["step"] == 8
    assert record["loss"] < 5.7  # ln 300, what an untrained twin has
    assert (uninterrupted / "loss.svg").read_text().startswith("<svg")


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, data, uninterrupted):
    Run(tmp_path, tiny(), RECIPE, data).train(until=3)
    assert state(tmp_path)["step"] == 3
    torch.manual_seed(99)
    Run(tmp_path, tiny(), RECIPE, data).train()
    assert_same(without_seconds(state(tmp_path)), without_seconds(state(uninterrupted)))


def test_killed_between_checkpoints_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, data, uninterrupted):
    run = Run(tmp_path, tiny(), RECIPE, data)
    step = run._train_step

    def killed():
        if run.step == 6:
            raise KeyboardInterrupt
        return step()

    run._train_step = killed
    with pytest.raises(KeyboardInterrupt):
        run.train(checkpoint_every=4)
    assert state(tmp_path)["step"] == 4
    Run(tmp_path, tiny(), RECIPE, data).train()
    assert_same(without_seconds(state(tmp_path)), without_seconds(state(uninterrupted)))


def test_resuming_drops_log_records_after_the_checkpoint(tmp_path, data):
    Run(tmp_path, tiny(), RECIPE, data).train(until=2)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4, "train_loss": 1.0}) + "\n")
    Run(tmp_path, tiny(), RECIPE, data)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [2]


def test_a_finished_run_stays_as_it_is(uninterrupted, data):
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    Run(uninterrupted, tiny(), RECIPE, data).train()
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "recipe"), [(tiny("element"), RECIPE), (tiny(), Recipe(steps=9, rows=2, held_out_bytes=2500))]
)
def test_resuming_with_other_settings_is_refused(uninterrupted, data, config, recipe):
    with pytest.raises(ValueError, match=r"written with other settings.*or name another folder"):
        Run(uninterrupted, config, recipe, data)


def test_read_run_gives_back_what_was_trained(uninterrupted):
    trained = read_run(uninterrupted)
    assert (trained.twin.config, trained.recipe, trained.step) == (tiny(), RECIPE, 8)
    assert_same(dict(trained.twin.state_dict()), dict(state(uninterrupted)["model"]))


def test_a_run_from_before_a_setting_existed_resumes_with_its_default(tmp_path, data, uninterrupted):
    Run(tmp_path, tiny(), RECIPE, data).train(until=3)
    stored = state(tmp_path)
    del stored["settings"]["recipe"]["short_context"], stored["settings"]["recipe"]["short_share"]
    torch.save(stored, tmp_path / "checkpoint.pt")
    assert read_run(tmp_path).recipe == RECIPE
    Run(tmp_path, tiny(), RECIPE, data).train()
    assert_same(without_seconds(state(tmp_path)), without_seconds(state(uninterrupted)))


def test_settings_of_a_later_version_are_named(tmp_path, data):
    Run(tmp_path, tiny(), RECIPE, data).train(until=1)
    stored = state(tmp_path)
    stored["settings"]["recipe"]["dropout"] = 0.1
    torch.save(stored, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"settings that this version of Sluice does not know: .*dropout"):
        read_run(tmp_path)


def test_short_rows_are_spread_evenly_and_keep_the_tokens_of_a_step():
    recipe = Recipe(rows=3, short_context=128, short_share=0.75)
    assert [recipe.shape(step, 512) for step in range(8)] == 2 * [(12, 128), (12, 128), (12, 128), (3, 512)]
    assert Recipe().shape(0, 512) == (3, 512)


def test_a_run_with_short_rows_sees_them(tmp_path, data):
    run = Run(tmp_path, tiny(), replace(RECIPE, steps=4, short_context=8, short_share=0.5), data)
    seen = []
    run.twin.register_forward_pre_hook(lambda _twin, inputs: seen.append(tuple(inputs[0].shape)))
    run.train(evaluate_every=100, until=3)
    assert seen[:3] == [(4, 8), (2, 16), (4, 8)]


def test_read_run_of_a_folder_without_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint\.pt"):
        read_run(tmp_path)


def test_cached_tokens_are_used_again(corpus, data):
    again = prepare_data(corpus, corpus.parent / "data", tiny("none"), RECIPE)
    assert again.tokenizer.to_str() == data.tokenizer.to_str()
    assert (again.train.tokens == data.train.tokens).all()
    assert (read_data(corpus.parent / "data", 16).held_out.tokens == data.held_out.tokens).all()
    assert {file.name for file in (corpus.parent / "data").iterdir()} == {"tokenizer.json", "tokens.npz", "source.json"}


def test_cached_tokens_of_another_corpus_are_refused(corpus, data, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether. " * 300)
    with pytest.raises(ValueError, match="tokens of another corpus or split"):
        prepare_data(other, corpus.parent / "data", tiny(), RECIPE)


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"lacks tokenizer\.json and tokens\.npz; name the cache folder"):
        read_data(tmp_path, 16)


def test_the_learning_rate_warms_up_then_falls_to_its_floor():
    recipe = Recipe(steps=1000, warmup_steps=100, learning_rate=1.0, final_learning_rate_ratio=0.1)
    rates = [recipe.rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[1000] == pytest.approx(0.1)
