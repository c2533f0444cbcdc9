"""`sluice lab train`, `evaluate` and `export`, end to end on a tiny corpus."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from vllm_sluice.lab.card import train_command
from vllm_sluice.lab.commands import add_commands, main, settings
from vllm_sluice.lab.export import as_exported, load
from vllm_sluice.lab.train import Recipe, read_run
from vllm_sluice.lab.twin import TwinConfig

SHAPE = shlex.split(
    "--steps 4 --rows 2 --layers 2 --hidden-size 16 --heads 2 --context 16 --vocab-size 300 --held-out-bytes 3000 "
    "--short-share 0"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    (folder / "corpus.txt").write_text("".join(f"{n} bottles of beer, take {n % 7} down.\n" for n in range(400)))
    for gate in ("none", "head"):
        assert train(folder, gate, gate) == 0
    return folder


@pytest.fixture(scope="module")
def exported(base):
    runs = ["--run", str(base / "head"), "--run", str(base / "none")]
    assert main(["export", *runs, "--out", str(base / "models"), "--loss-rows", "64", "--trace-rows", "4"]) == 0
    return base / "models"


def train(base, gate, out, *more):
    return main(
        ["train", "--corpus", str(base / "corpus.txt"), "--out", str(base / out), "--gate", gate, *SHAPE, *more]
    )


def parser():
    top = argparse.ArgumentParser(prog="sluice")
    add_commands(top.add_subparsers(required=True))
    return top


def test_defaults_are_those_of_the_shipped_twins():
    args = parser().parse_args(["lab", "train", "--corpus", "c", "--out", "o"])
    config = TwinConfig(hidden_size=192, heads=3, intermediate_size=512)
    assert settings(args) == (config, Recipe(steps=13_000, rows=4, short_context=128, short_share=0.75))
    assert args.threads == 1


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (TwinConfig(), Recipe()),
        (
            TwinConfig(hidden_size=192, heads=3, intermediate_size=512, gate="head"),
            Recipe(
                steps=100, rows=5, learning_rate=1e-3, weight_decay=0.1, seed=3, held_out_bytes=1000, short_share=0.5
            ),
        ),
    ],
)
def test_the_cards_command_trains_the_same_twin(config, recipe):
    words = shlex.split(train_command(config, recipe))
    assert words[0] == "sluice"
    assert settings(parser().parse_args(words[1:])) == (config, recipe)


@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 512), (256, 704), (384, 1024), (16, 64)])
def test_default_feed_forward_width(hidden, intermediate):
    words = ["lab", "train", "--corpus", "c", "--out", "o", "--hidden-size", str(hidden), "--heads", "1"]
    assert settings(parser().parse_args(words))[0].intermediate_size == intermediate


def test_twins_share_the_cache_beside_their_folders(base):
    assert {file.name for file in (base / "data").iterdir()} == {"tokenizer.json", "tokens.npz", "source.json"}
    assert read_run(base / "head").step == read_run(base / "none").step == 4


def test_train_resumes(base, capsys):
    assert train(base, "none", "resumed", "--until", "1") == 0
    assert train(base, "none", "resumed") == 0
    said = capsys.readouterr()
    assert "resuming" in said.err
    assert "after step 1" in said.err
    assert "4 of 4 steps" in said.out


def test_train_with_other_settings_fails_with_a_message(base, capsys):
    assert train(base, "element", "head") == 1
    assert "sluice lab train: " in (said := capsys.readouterr().err)
    assert "written with other settings" in said


def test_train_without_its_corpus_fails_with_a_message(base, capsys):
    assert main(["train", "--corpus", str(base / "no.txt"), "--out", str(base / "x")]) == 1
    assert "no.txt" in capsys.readouterr().err


def evaluate(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json", "--loss-rows", "64", "--trace-rows", "4"]) == 0
    return json.loads(capsys.readouterr().out)


def test_export_writes_both_twins_and_the_verdict(base, exported):
    assert {folder.name for folder in exported.iterdir()} == {"twin-vanilla", "twin-gated"}
    for run, name in (("none", "twin-vanilla"), ("head", "twin-gated")):
        rounded = as_exported(read_run(base / run).twin)
        assert all(
            (a == b).all()
            for a, b in zip(rounded.state_dict().values(), load(exported / name).state_dict().values(), strict=True)
        )


def test_run_checkpoint_and_card_agree_on_the_measurements(base, exported, capsys):
    of_run = evaluate(capsys, base / "head")
    of_checkpoint = evaluate(capsys, exported / "twin-gated", "--cache", base / "data")
    assert {**of_run, "folder": ""} == {**of_checkpoint, "folder": ""}
    vanilla = evaluate(capsys, base / "none")
    card = (exported / "twin-gated" / "README.md").read_text()
    assert f"| held-out loss, nats a token | {vanilla['loss']:.4f} | {of_run['loss']:.4f} |" in card
    assert f"| mean gate | - | {of_run['gate_mean']:.3f} |" in card
    assert "The loss is over 64 rows of 16 tokens, everything else over 4 rows" in card
    assert "are missed**" in card  # 4 steps teach nothing


def test_held_out_text_of_the_corpus_is_what_training_held_out(base, exported, capsys):
    cached = evaluate(capsys, exported / "twin-gated", "--cache", base / "data")
    text = evaluate(capsys, exported / "twin-gated", "--corpus", base / "corpus.txt", "--held-out-bytes", 3000)
    assert cached == text
    whole = evaluate(capsys, exported / "twin-gated", "--corpus", base / "corpus.txt", "--held-out-bytes", 0)
    assert whole["loss"] != text["loss"]


def test_evaluate_prints_a_table(base, capsys):
    assert main(["evaluate", str(base / "head"), "--loss-rows", "64", "--trace-rows", "4"]) == 0
    table = capsys.readouterr().out
    assert "Gu sink rate" in table
    assert "mean gate" in table
    assert len(table.splitlines()) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "models/twin-gated"], "brings no text; name one with --corpus"),
        (["evaluate", "data"], "holds neither config.json"),
        (
            ["evaluate", "none", "--cache", "models"],
            "holds no tokenizer.json; name the folder that has it with --cache",
        ),
        (["export", "--run", "none", "--out", "x"], "1 --run given; give two"),
        (["export", "--run", "none", "--run", "none", "--out", "x"], "the gates none and none"),
        (["export", "--run", "none", "--run", "data", "--out", "x"], "holds no checkpoint.pt"),
    ],
)
def test_mistakes_are_explained(arguments, message, base, exported, capsys, monkeypatch):
    monkeypatch.chdir(base)
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_export_refuses_runs_that_are_not_twins(base, capsys):
    assert train(base, "head", "shorter", "--until", "2") == 0
    arguments = ["--run", str(base / "none"), "--run", str(base / "shorter"), "--out", str(base / "x")]
    assert main(["export", *arguments]) == 1
    assert "the runs are not twins, they differ in step 4 and 2" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["63", "65", "8", "0"])
def test_the_loss_needs_64_rows(rows, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "x", "--loss-rows", rows])
    assert "is not a multiple of 8 from 64 on" in capsys.readouterr().err


def test_the_parser_does_not_import_torch():
    code = (
        "import sys, argparse; from vllm_sluice.lab.commands import add_commands;"
        "add_commands(argparse.ArgumentParser().add_subparsers()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
