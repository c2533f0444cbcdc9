"""The commands `sluice lab train`, `sluice lab evaluate` and `sluice lab export`.

Also `python -m vllm_sluice.lab.commands train|evaluate|export`. What needs torch is imported when a command runs, so
that building the parser stays cheap.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_sluice.lab.card import Measured
    from vllm_sluice.lab.corpus import Rows
    from vllm_sluice.lab.evaluate import Evaluation
    from vllm_sluice.lab.train import Recipe, Trained
    from vllm_sluice.lab.twin import Twin, TwinConfig

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_LOSS_BATCH = 8
_LEAST_LOSS_ROWS = 64


def add_commands(subparsers: Subparsers) -> None:
    """Add `lab` with its commands to a parser; `args.run(args)` runs the chosen one and returns the exit status."""
    lab = subparsers.add_parser("lab", help="train, measure and export gated and ungated twins")
    _add_lab_commands(lab.add_subparsers(dest="lab_command", required=True, metavar="COMMAND"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `train`, `evaluate` or `export`."""
    parser = argparse.ArgumentParser(prog="python -m vllm_sluice.lab.commands", description=__doc__.splitlines()[0])
    _add_lab_commands(parser.add_subparsers(dest="lab_command", required=True, metavar="COMMAND"))
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


def _add_lab_commands(commands: Subparsers) -> None:
    _add_train(commands)
    _add_evaluate(commands)
    _add_export(commands)


def _add(
    commands: Subparsers, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    def guarded(args: argparse.Namespace) -> int:
        try:
            run(args)
        except (ValueError, OSError) as error:
            print(f"sluice lab {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"sluice lab {name}: stopped", file=sys.stderr)
            return 130
        return 0

    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=guarded)
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads (default: %(default)s)")
    return parser


def _add_train(commands: Subparsers) -> None:
    parser = _add(commands, "train", _train, "train one twin, or go on with a training that was stopped")
    default = "default: %(default)s"
    parser.add_argument("--corpus", type=Path, required=True, metavar="PATH", help="UTF-8 text, plain or .xz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of this run")
    parser.add_argument("--gate", choices=("none", "head", "element"), default="none", help=default)
    parser.add_argument("--steps", type=_positive, default=13_000, metavar="N", help=default)
    parser.add_argument("--rows", type=_positive, default=4, metavar="N", help=f"rows a step ({default})")
    parser.add_argument("--layers", type=_positive, default=6, metavar="N", help=default)
    parser.add_argument("--hidden-size", type=_positive, default=192, metavar="N", help=default)
    parser.add_argument("--intermediate-size", type=_positive, metavar="N", help="default: 8/3 of the hidden size")
    parser.add_argument("--heads", type=_positive, default=3, metavar="N", help=default)
    parser.add_argument("--context", type=_positive, default=512, metavar="N", help=f"tokens a row ({default})")
    parser.add_argument("--vocab-size", type=_positive, default=4096, metavar="N", help=default)
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="N", help=default)
    parser.add_argument("--weight-decay", type=float, default=0.5, metavar="N", help=default)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=default)
    parser.add_argument(
        "--short-context", type=_positive, default=128, metavar="N", help=f"see --short-share ({default})"
    )
    parser.add_argument(
        "--short-share", type=float, default=0.75, metavar="SHARE",
        help=f"share of the steps, spread evenly, with more but shorter rows, of --short-context tokens ({default})",
    )  # fmt: skip
    parser.add_argument(
        "--gate-bias", type=float, default=-1.0, metavar="LOGIT", help=f"bias that every gate starts from ({default})"
    )
    parser.add_argument(
        "--compile", dest="compiled", action="store_true", help="compile the training step (torch.compile)"
    )
    parser.add_argument("--until", type=_positive, metavar="STEP", help="stop here, before the last step; resumable")
    parser.add_argument(
        "--held-out-bytes", type=_positive, default=2_000_000, metavar="N",
        help=f"bytes at the corpus' end kept out of training ({default})",
    )  # fmt: skip
    _add_cache(parser, "folder of the tokenizer and the tokens, shared by both twins (default: `data` beside --out)")


def _add_evaluate(commands: Subparsers) -> None:
    parser = _add(commands, "evaluate", _evaluate, "measure an exported twin or a training run on held-out text")
    parser.add_argument("folder", type=Path, help="folder of an exported twin or of a training run")
    parser.add_argument("--corpus", type=Path, metavar="PATH", help="text to measure on (default: the cached tokens)")
    parser.add_argument(
        "--held-out-bytes", type=int, default=2_000_000, metavar="N",
        help="bytes at the end of --corpus to measure on, 0 for all of it (default: %(default)s)",
    )  # fmt: skip
    _add_rows(parser)
    _add_cache(parser, "folder of the tokenizer and the tokens of a training run (default: `data` beside the run)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_export(commands: Subparsers) -> None:
    parser = _add(commands, "export", _export, "measure a pair of twins and write both as checkpoints with model cards")
    parser.add_argument(
        "--run", dest="runs", type=Path, action="append", required=True, metavar="FOLDER",
        help="folder of a training run; give it twice, for the ungated and the gated twin",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where twin-vanilla and twin-gated go"
    )
    parser.add_argument(
        "--data", metavar="TEXT", help="what the corpus is, for the card (default: the shipped twins' books)"
    )
    _add_rows(parser)
    _add_cache(parser, "folder of the tokenizer and the tokens of both runs (default: `data` beside the first run)")


def _add_cache(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help=text)


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loss-rows", type=_loss_rows, default=128, metavar="N",
        help=f"rows of full context for the loss, a multiple of {_LOSS_BATCH} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--trace-rows", type=_positive, default=64, metavar="N",
        help="rows of 64 tokens for sinks, activations and gates (default: %(default)s)",
    )  # fmt: skip


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _loss_rows(text: str) -> int:
    value = int(text)
    if value < _LEAST_LOSS_ROWS or value % _LOSS_BATCH:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of {_LOSS_BATCH} from {_LEAST_LOSS_ROWS} on")
    return value


def settings(args: argparse.Namespace) -> tuple[TwinConfig, Recipe]:
    """Return the shape and the recipe that the arguments of `train` ask for."""
    from vllm_sluice.lab.train import Recipe
    from vllm_sluice.lab.twin import TwinConfig

    config = TwinConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=args.heads,
        intermediate_size=args.intermediate_size or _intermediate_size(args.hidden_size),
        context=args.context,
        gate=args.gate,
        gate_bias_init=args.gate_bias,
    )
    recipe = Recipe(
        steps=args.steps,
        rows=args.rows,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        seed=args.seed,
        held_out_bytes=args.held_out_bytes,
        short_context=args.short_context,
        short_share=args.short_share,
    )
    return config, recipe


def _intermediate_size(hidden_size: int) -> int:
    """Return 8/3 of the hidden size, up to the next multiple of 64: as many weights as an ungated 4x feed-forward."""
    return -(-8 * hidden_size // (3 * 64)) * 64


def _train(args: argparse.Namespace) -> None:
    import torch

    from vllm_sluice.lab.train import Run, prepare_data

    torch.set_num_threads(args.threads)
    config, recipe = settings(args)
    data = prepare_data(args.corpus, args.cache or args.out.parent / "data", config, recipe)
    run = Run(args.out, config, recipe, data, compiled=args.compiled)
    if run.step:
        print(f"resuming {args.out} after step {run.step}", file=sys.stderr)
    run.train(until=args.until)
    print(f"{args.out}: {run.step} of {recipe.steps} steps")


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    twin = _read_twin(args.folder)
    held_out = _held_out(args, twin.config)
    found = _evaluation(twin, held_out, args)
    if args.json:
        about = {"folder": str(args.folder), "loss_rows": args.loss_rows, "trace_rows": args.trace_rows}
        print(json.dumps({**about, "config": asdict(twin.config), **found.as_dict()}, indent=2))
    else:
        print(_evaluation_table(found))


def _export(args: argparse.Namespace) -> None:
    import torch

    from vllm_sluice.lab.card import BOOKS, bars, bars_table, model_card, twin_name
    from vllm_sluice.lab.export import export
    from vllm_sluice.lab.train import read_data

    torch.set_num_threads(args.threads)
    pair = _read_pair(args.runs)
    data = read_data(args.cache or _cache_beside(args.runs[0]), pair[0].twin.config.context)
    vanilla, gated = (_measure(trained, data.held_out, args) for trained in pair)
    for trained, this in zip(pair, (vanilla, gated), strict=True):
        card = model_card(
            this, vanilla, gated,
            loss_rows=args.loss_rows, trace_rows=args.trace_rows, data=args.data or BOOKS,
        )  # fmt: skip
        folder = args.out / twin_name(this.config)
        export(trained.twin, data.tokenizer, folder, card)
        print(f"wrote {folder}")
    print(bars_table(bars(vanilla.evaluation, gated.evaluation)))


def _read_twin(folder: Path) -> Twin:
    """Read an exported twin, or a run's latest checkpoint with its weights rounded as an export would."""
    from vllm_sluice.lab.export import as_exported, load
    from vllm_sluice.lab.train import read_run

    if (folder / "config.json").exists():
        return load(folder)
    if (folder / "checkpoint.pt").exists():
        return as_exported(read_run(folder).twin)
    raise ValueError(f"{folder} holds neither config.json (an exported twin) nor checkpoint.pt (a training run).")


def _held_out(args: argparse.Namespace, config: TwinConfig) -> Rows:
    """Return the rows to measure on: the end of `--corpus`, or what training held out."""
    from tokenizers import Tokenizer

    from vllm_sluice.lab.corpus import Rows, encode, read_text, split_held_out
    from vllm_sluice.lab.train import read_data

    exported = (args.folder / "config.json").exists()
    if args.corpus is None and args.cache is None and exported:
        raise ValueError(f"{args.folder} is an exported twin and brings no text; name one with --corpus (or --cache).")
    cache = args.cache or _cache_beside(args.folder)
    own = args.folder if exported else cache
    if not (own / "tokenizer.json").exists():
        raise ValueError(f"{own} holds no tokenizer.json; name the folder that has it with --cache.")
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    if args.corpus is not None:
        text = read_text(args.corpus)
        if args.held_out_bytes:
            _, text = split_held_out(text, args.held_out_bytes)
        return Rows(encode(tokenizer, text), config.context)
    data = read_data(cache, config.context)
    if data.tokenizer.to_str() != tokenizer.to_str():
        raise ValueError(f"{cache} was made with another tokenizer than {args.folder}; name the text with --corpus.")
    return data.held_out


def _cache_beside(run: Path) -> Path:
    return run.resolve().parent / "data"


def _read_pair(runs: list[Path]) -> tuple[Trained, Trained]:
    """Read the ungated and the gated twin, and refuse two runs that are not twins."""
    from vllm_sluice.lab.train import read_run

    if len(runs) != 2:
        raise ValueError(f"{len(runs)} --run given; give two, one of the ungated and one of the gated twin.")
    trained = sorted((read_run(folder) for folder in runs), key=lambda t: t.twin.config.gate != "none")
    gates = [t.twin.config.gate for t in trained]
    if gates[0] != "none" or gates[1] == "none":
        raise ValueError(f"the runs have the gates {' and '.join(gates)}; one has to be none and the other not.")
    sides = [{**asdict(t.twin.config), **asdict(t.recipe), "step": t.step} for t in trained]
    differing = [key for key in sides[0] if key != "gate" and sides[0][key] != sides[1][key]]
    if differing:
        listed = ", ".join(f"{key} {sides[0][key]} and {sides[1][key]}" for key in differing)
        raise ValueError(
            f"the runs are not twins, they differ in {listed}. Train both with the same settings and steps."
        )
    return trained[0], trained[1]


def _evaluation(twin: Twin, held_out: Rows, args: argparse.Namespace) -> Evaluation:
    from vllm_sluice.lab.evaluate import evaluate

    return evaluate(
        twin,
        held_out,
        loss_batches=args.loss_rows // _LOSS_BATCH,
        loss_rows=_LOSS_BATCH,
        trace_rows=args.trace_rows,
        progress=True,
    )


def _measure(trained: Trained, held_out: Rows, args: argparse.Namespace) -> Measured:
    from vllm_sluice.lab.card import Measured
    from vllm_sluice.lab.export import as_exported

    twin = as_exported(trained.twin)
    evaluation = _evaluation(twin, held_out, args)
    parameters = sum(parameter.numel() for parameter in twin.parameters())
    return Measured(twin.config, trained.recipe, trained.step, parameters, evaluation)


def _evaluation_table(found: Evaluation) -> str:
    gates = []
    if found.gate_mean is not None:
        gates = [f"mean gate       {found.gate_mean:.3f}, {found.gate_closed:.1%} below 0.1"]
    lines = [
        f"loss            {found.loss:.4f} nats a token",
        f"Gu sink rate    {found.sink_rate:.2%}",
        f"F-Attn          {found.first_token_attention:.3f}",
        f"token 0, ratio  {found.first_token_ratio:.1f} x the median",
        *gates,
        "",
        f"{'layer':>5} {'F-Attn':>8} {'|h| token 0':>12} {'|h| others':>11} {'median':>8} {'kurtosis':>9}",
    ]
    columns = zip(
        found.layer_first_token_attention,
        found.first_token_abs_max,
        found.other_token_abs_max,
        found.median,
        found.kurtosis,
        strict=True,
    )
    for layer, (attention, first, other, median, kurtosis) in enumerate(columns):
        lines.append(f"{layer:>5} {attention:>8.3f} {first:>12.2f} {other:>11.2f} {median:>8.3f} {kurtosis:>9.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
