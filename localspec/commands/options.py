"""Options that several commands share, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from localspec.constraint import Grammar
    from localspec.drafters import DrafterSpec
    from localspec.sampling import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])


# llama.cpp's names of methods -> ours
_SPEC_TYPES = {
    "none": "nothing",
    "draft-simple": "draft_model",
    "draft-dflash": "dflash",
    "draft-dspark": "dspark",
    "draft-eagle3": "eagle3",
    "draft-mtp": "mtp",
    "ngram-simple": "ngram",
    "ngram-map-k": "ngram",
    "ngram-mod": "ngram",
}


def catalog_option(command: F) -> F:
    """A catalog over those that are always read."""
    help_text = "A catalog of your own, over localspec's."
    path = click.Path(path_type=Path, dir_okay=False)
    return click.option("--catalog", type=path, metavar="FILE", help=help_text)(command)


def load_options(command: F) -> F:
    """What to load."""
    options = [
        click.option(
            "--target",
            "-m",
            "--model",
            "-hf",
            "--hf-repo",
            metavar="MODEL",
            help="Path, bundled name, or pulled ORG/NAME[:QUANT] [default: the bundled pair].",
        ),
        click.option(
            "--draft",
            "-md",
            "--draft-model",
            "--model-draft",
            "--spec-draft-model",
            "-hfd",
            "--hf-repo-draft",
            "--spec-draft-hf",
            metavar="MODEL",
            help="Draft model; of another tokenizer, too; self[:KIND]: a copy of the target with fewer bits. A trained "
            "head is taken as --head.",
        ),
        click.option(
            "--head",
            "heads",
            multiple=True,
            metavar="MODEL",
            help="Trained head for the target (DSpark, EAGLE-3, ...), or early_exit[:layers=N]: its own first layers "
            "(MLX). Repeatable, one of a kind.",
        ),
        click.option("--pair", metavar="NAME[:QUANTISATION]", help="Both from the catalog; see `localspec pairs`."),
        click.option("--task", metavar="NAME", help="With --pair: the drafter that was made for this kind of text."),
        catalog_option,
        click.option("--backend", default="auto", show_default=True, metavar="NAME", help="auto, llamacpp or mlx."),
        click.option(
            "--context", "-c", "--ctx-size", type=click.IntRange(min=8), metavar="N", help="Tokens of context."
        ),
        click.option("--threads", "-t", type=click.IntRange(min=1), metavar="N", help="CPU threads (llama.cpp)."),
        click.option(
            "--gpu-layers",
            "-ngl",
            type=click.IntRange(min=0),
            metavar="N",
            help="Layers on the GPU (llama.cpp) [default: all].",
        ),
        click.option(
            "--flash-attention/--no-flash-attention", "-fa", default=None, help="Flash attention (llama.cpp)."
        ),
        click.option("--extra-buffers/--no-extra-buffers", default=None, help="Repacked CPU weights (llama.cpp)."),
        click.option(
            "--cache-type", "-ctk", metavar="TYPE", help="Keys and values are kept as f16 or bf16 (llama.cpp) [f16]."
        ),
        click.option("--dtype", metavar="TYPE", help="Compute type (MLX): float32, float16 or bfloat16."),
        click.option(
            "--check-memory/--no-check-memory", default=True, help="Refuse what memory does not allow; see `fit`."
        ),
    ]
    return apply_options(options, command)


def draft_options(command: F) -> F:
    """How to draft."""
    options = [
        click.option(
            "--drafter",
            default="auto",
            show_default=True,
            metavar="NAME[:SETTING=VALUE,...]",
            help="auto, draft_model, cross_tokenizer, suffix, ngram, grammar, nothing, or the kind of a head (dspark, "
            "dflash, dflash2, eagle3, medusa, mtp, jetspec, early_exit); e.g. suffix:num=8, "
            "draft_model:num=16,shape=tree, or draft_model+ngram for both in one tree.",
        ),
        click.option("--spec-type", type=click.Choice(sorted(_SPEC_TYPES)), help="llama.cpp's name of a drafter."),
        click.option(
            "--num-draft",
            "--num-draft-tokens",
            "--spec-draft-n-max",
            "--draft-max",
            "--draft-n",
            "num_draft",
            type=int,
            metavar="N",
            help="Tokens guessed per round (the drafter's `num`).",
        ),
        click.option(
            "--draft-min-prob",
            "--spec-draft-p-min",
            "--draft-p-min",
            "draft_min_prob",
            type=float,
            metavar="P",
            help="Stop a guess below this probability (the draft model's `min_prob`).",
        ),
        click.option("--plain", is_flag=True, help="Decode without speculation, otherwise alike."),
        click.option(
            "--acceptance",
            default="walk",
            show_default=True,
            metavar="RULE",
            help="walk (text equals --plain) or rejection (equal in distribution).",
        ),
        exact_option,
    ]
    return apply_options(options, command)


def remember_options(environment: str | None) -> Callable[[F], F]:
    """Whether sessions are kept. environment: the variable that says so, too, where one may."""
    also = f"; also from {environment}=1" if environment else ""
    options = [
        click.option(
            "--remember/--no-remember",
            default=False,
            envvar=environment,
            help=f"Keep what is said on this machine and guess from it later (`localspec kept`){also} [default: no].",
        ),
        click.option(
            "--remember-size",
            type=click.IntRange(1, 1024),
            default=2,
            show_default=True,
            metavar="MIB",
            help="With --remember: most that is kept; the oldest goes first.",
        ),
    ]
    return lambda command: apply_options(options, command)


def exact_option(command: F) -> F:
    """What is promised of the text. Names as in `localspec.exactness`, which is not imported for `--help`."""
    return click.option(
        "--exact",
        type=click.Choice(["auto", "class", "guarded", "off"]),
        default="auto",
        show_default=True,
        help="How text is kept that of plain decoding: class (padded passes), guarded (close choices are re-checked), "
        "off (not at all); auto keeps the promise.",
    )(command)


def sampling_options(command: F) -> F:
    """How the target samples."""
    options = [
        click.option("--temperature", "--temp", type=float, metavar="T", help="0 takes the best token."),
        click.option("--top-k", type=int, default=0, metavar="N", help="Keep the N best tokens; 0 keeps all."),
        click.option("--top-p", type=float, default=1.0, metavar="P", help="Keep the best tokens up to this mass."),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            metavar="P",
            help="Keep tokens of at least P times the best one's probability.",
        ),
        click.option("--repetition-penalty", "--repeat-penalty", type=float, default=1.0, metavar="X"),
        click.option("--presence-penalty", type=float, default=0.0, metavar="X"),
        click.option("--frequency-penalty", type=float, default=0.0, metavar="X"),
        click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="Add to a token's logit. Repeatable."),
        click.option("--seed", "-s", type=int, metavar="N", help="Same seed, same text [default: random, printed]."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable."),
        click.option("--max-tokens", "-n", "--n-predict", type=int, metavar="N", help="Longest answer."),
        click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end."),
    ]
    return apply_options(options, command)


def grammar_options(command: F) -> F:
    """What an answer may look like."""
    options = [
        click.option(
            "--json-schema",
            "-j",
            "-jf",
            "--json-schema-file",
            metavar="FILE|JSON",
            help="Answer in JSON of this schema; {} for any JSON.",
        ),
        click.option("--regex", metavar="PATTERN", help="Answer with text that a regular expression matches."),
        click.option(
            "--grammar",
            "--grammar-file",
            metavar="FILE|TEXT",
            help="Answer by a grammar: llguidance's Lark, or llama.cpp's GBNF.",
        ),
    ]
    return apply_options(options, command)


def view_options(command: F) -> F:
    """How to see what was guessed."""
    options = [
        click.option(
            "--show-drafts",
            is_flag=True,
            help="Colour the tokens that were guessed ahead; underline those that were not the first guess.",
        ),
        click.option(
            "--trace",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Write every round to FILE, for `localspec trace`.",
        ),
    ]
    return apply_options(options, command)


def in_a_folder(_: click.Context, parameter: click.Parameter, output: Path | None) -> Path | None:
    """Refuse a place that cannot be written before an hour of measuring, not after it."""
    from localspec.errors import SettingError

    if output is not None and not output.parent.is_dir():
        raise SettingError(f"{parameter.opts[0]}: no such folder: {output.parent}", fix="Make it first.")
    return output


def apply_options(options: Sequence[Callable[[Any], Any]], command: F) -> F:
    """The command with these options, listed in `--help` in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def drafter_spec(options: dict[str, Any]) -> DrafterSpec:
    """Fold --plain and the spellings of other programs into one specification. Raises SettingError."""
    from localspec.errors import SettingError

    spec = _named_drafter(options)
    if options.get("remember") and not spec.remembers and _was_typed("remember"):
        raise SettingError(
            "--remember is of use to drafters that guess from what was said", got=spec.name, expected="auto or suffix"
        )
    return spec


def _was_typed(name: str) -> bool:
    """Did the user write this option down, here and now?"""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _named_drafter(options: dict[str, Any]) -> DrafterSpec:
    from localspec.drafters import DrafterSpec
    from localspec.errors import SettingError

    spec = DrafterSpec.parse(options["drafter"])
    if options["spec_type"] is not None:
        if options["drafter"] != "auto":
            raise SettingError("--spec-type and --drafter both name a drafter", fix="Give one of them.")
        spec = DrafterSpec.parse(_SPEC_TYPES[options["spec_type"]])
    extra = {"num": options["num_draft"], "min_prob": options["draft_min_prob"]}
    given = {name: str(value) for name, value in extra.items() if value is not None}
    if options["plain"]:
        if given or options["drafter"] != "auto" or options["spec_type"] is not None:
            raise SettingError("--plain leaves nothing to draft", fix="Leave out --plain, or the drafter's options.")
        return DrafterSpec.parse("nothing")
    return spec.with_settings(given)


def chosen_grammar(options: dict[str, Any]) -> Grammar | None:
    """The grammar that the options name, if any. Raises SettingError."""
    from localspec.constraint import Grammar
    from localspec.errors import SettingError

    given = [name for name in ("json_schema", "regex", "grammar") if options[name] is not None]
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SettingError(f"{names} each say what the answer looks like", fix="Give one of them.")
    if options["json_schema"] is not None:
        return Grammar.json_schema(_read_or_take("--json-schema", options["json_schema"], "{"))
    if options["grammar"] is not None:
        return Grammar.lark(_read_or_take("--grammar", options["grammar"], ":"))
    return None if options["regex"] is None else Grammar.regex(options["regex"])


def _read_or_take(option: str, value: str, mark: str) -> str:
    """The content of a file, or the text itself if there is no such file and it holds what such texts hold."""
    from localspec.errors import SettingError

    try:
        if Path(value).is_file():
            return Path(value).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(f"{option}: {value} is not text", got=error) from None
    except (OSError, ValueError) as error:
        if mark not in value:  # it may be text, which is too long for a name
            raise SettingError(f"{option}: {value} cannot be read", got=error) from None
    if mark not in value:
        raise SettingError(f"{option}: no such file: {value}", fix="Check the path, or give the text itself.")
    return value


def sampling_params(options: dict[str, Any], *, default_temperature: float) -> SamplingParams:
    """The sampling settings that the options name. Raises SettingError."""
    from localspec.errors import SettingError
    from localspec.sampling import SamplingParams

    bias = {}
    for item in options["logit_bias"]:
        token, _, value = item.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise SettingError("--logit-bias", got=item, expected="TOKEN_ID=NUMBER") from None
    names = (
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "max_tokens",
        "ignore_eos",
    )
    temperature = options["temperature"] if options["temperature"] is not None else default_temperature
    return SamplingParams(
        temperature=temperature, logit_bias=bias, stop=tuple(options["stop"]), **{name: options[name] for name in names}
    )
