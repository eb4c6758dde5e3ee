"""A config is right or gets one line that says what would be; and nothing in it is unread."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_srpo import config_file
from megatron_srpo.config import Config
from megatron_srpo.config_file import dump_config, field_names, load_config
from megatron_srpo.config_method import AlgorithmConfig
from megatron_srpo.config_sections import Section
from megatron_srpo.types import InputError
from tests.unit.builders import DEFAULTS, config

PACKAGE = Path(config_file.__file__).parent
KNOBS = ("config_sections.py", "config.py")


def written(folder: Path, text: str | None = None) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(DEFAULTS) if text is None else text)
    return path


def refusal(folder: Path, *overrides: str, text: str | None = None) -> str:
    """The message, without the file's name in front."""
    path = written(folder, text)
    with pytest.raises(InputError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message and message
    return message.removeprefix(f"{path}: ")


# --- right ones ----------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    cfg = load_config(written(tmp_path), ["rollout.temperature=0.5", "seed=7"])
    assert (cfg.rollout.temperature, cfg.seed) == (0.5, 7)
    assert cfg.rollout.max_response_tokens == 24
    assert cfg.rollout.max_num_seqs == 256
    assert cfg.model == Path("model")


def test_a_value_can_be_taken_from_another_key(tmp_path: Path):
    cfg = load_config(written(tmp_path), ["model=${run_dir}/hf", "run_dir=there"])
    assert cfg.model == Path("there/hf")


def test_a_dumped_config_is_the_same_config(tmp_path: Path):
    overrides = [
        "localize.template='{prompt}é\\n\\\\boxed{{1}}: \"{steps}\" # x'",
        "optimizer.lr=3.0e-7",
        "sft={run_dir: r, model: m, data: d}",
        "retention.data=here.jsonl",
    ]
    cfg = load_config(written(tmp_path), overrides)
    assert "é" in cfg.localize.template and cfg.optimizer.lr == 3e-7
    assert load_config(written(tmp_path, dump_config(cfg))) == cfg


@given(st.text(st.sampled_from("$\\{}ab'\" :#\n\t1e5.é\x85\u2028"), min_size=1, max_size=8))
@example("${seed}")
@example("\\${seed}")  # a price in LaTeX
@example("1e5")
def test_a_dumped_text_is_read_as_the_same_text(text: str):
    cfg = config(thoughts={"delimiter": text, "max_tokens": 4})
    with TemporaryDirectory() as folder:
        assert load_config(written(Path(folder), dump_config(cfg))) == cfg


def test_a_dumped_config_writes_every_default_out(tmp_path: Path):
    cfg = load_config(written(tmp_path), ["sft={run_dir: r, model: m, data: d}"])
    dumped = yaml.safe_load(dump_config(cfg))
    for name in field_names():
        value = dumped
        for part in name.split("."):
            part = next(iter(value)) if part == "*" else part
            assert part in value, name
            value = value[part]


@pytest.mark.parametrize(
    "resets, num_rollouts, split, shape",
    [
        ("self", 8, "1x4", (4, 1, 4)),
        ("random", 8, "1x7", (1, 1, 7)),
        ("self", 12, "2x3", (6, 2, 3)),
        ("none", 8, "1x4", (8, 0, 4)),
    ],
)
def test_the_split_divides_the_rollouts(
    resets: str, num_rollouts: int, split: str, shape: tuple[int, int, int]
):
    cfg = AlgorithmConfig(resets=resets, num_rollouts=num_rollouts, split=split)
    assert (cfg.num_base, cfg.num_seeds, cfg.num_suffixes) == shape


# --- wrong ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("rollout.temprature", "rollout.temperature"),
        ("rollouts.temperature", None),
        ("optimizer.learning_rate", None),
        ("num_step", "num_steps"),
        ("algorithm.num_rollout", "algorithm.num_rollouts"),
        ("beta1", "optimizer.beta1"),
        ("rollout.lr", "optimizer.lr"),
        ("data.delimiter", "thoughts.delimiter"),
        ("max_prompt_tokens", "data.max_prompt_tokens"),
        ("sft.optimizer.lrr", "sft.optimizer.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(tmp_path: Path, key: str, nearest: str | None):
    message = refusal(tmp_path, f"{key}=1")
    top = key if nearest else key.split(".")[0]
    assert message.startswith("unknown key ") and top in message
    if nearest:
        assert message == f"unknown key {key!r}; did you mean {nearest!r}?"


def test_a_key_like_no_other_is_refused_without_a_guess(tmp_path: Path):
    assert refusal(tmp_path, "zzzzqqqq=1") == "unknown key 'zzzzqqqq'"


@pytest.mark.parametrize(
    "override, message",
    [
        ("num_steps=0", "num_steps=0: Input should be greater than 0"),
        ("num_steps=-3", "num_steps=-3: Input should be greater than 0"),
        ("num_steps=many", "num_steps='many': Input should be a valid integer"),
        ("num_steps=1.5", "num_steps=1.5: Input should be a valid integer"),
        ("algorithm.num_prompts=0", "algorithm.num_prompts=0: Input should be greater than 0"),
        ("algorithm.num_rollouts=-8", "algorithm.num_rollouts=-8: Input should be greater than 0"),
        ("algorithm.seeds=first", "algorithm.seeds='first': Input should be 'in_group' or"),
        ("algorithm.split=4x", "algorithm.split='4x': String should match"),
        ("algorithm.split=1x0", "algorithm.split='1x0': String should match"),
        ("rollout.temperature=0", "rollout.temperature=0: Input should be greater than 0"),
        ("rollout.temperature=nan", "rollout.temperature='nan': Input should be"),
        ("optimizer.lr=-1", "optimizer.lr=-1: Input should be greater than or equal to 0"),
        ("optimizer.lr=inf", "optimizer.lr='inf': Input should be a finite number"),
        ("optimizer.beta1=1", "optimizer.beta1=1: Input should be less than 1"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1: Input should be greater"),
        ("thoughts.delimiter=''", "thoughts.delimiter='': String should have at least 1"),
        ("eval.num_prompts=0", "eval.num_prompts=0: Input should be greater than 0"),
        ("micro_batch_tokens=0", "micro_batch_tokens=0: Input should be greater than 0"),
        ("max_logprob_diff=0", "max_logprob_diff=0: Input should be greater than 0"),
        ("data=5", "data=5: Input should be a valid dictionary"),
        ("data.train=null", "data.train=None: Input is not a valid path"),
        ("dtype=float16", "dtype='float16': Input should be 'float32' or 'bfloat16'"),
    ],
)
def test_a_bad_value_gets_one_line_with_its_name_and_value(
    tmp_path: Path, override: str, message: str
):
    assert refusal(tmp_path, override).startswith(message)


@pytest.mark.parametrize(
    "num_rollouts, split, seeds, message",
    [
        (7, "2x4", "extra_draws", "num_rollouts=7 does not fit split=2x4, which alone makes 8"),
        (8, "1x9", "in_group", "num_rollouts=8 does not fit split=1x9, which alone makes 9"),
        (
            8,
            "2x4",
            "in_group",
            "num_rollouts=8 with split=2x4 has 0 base rollouts and needs 2 failed ones among "
            "them; give more num_rollouts, or seeds=extra_draws",
        ),
        (
            16,
            "1x4",
            "extra_draws",
            "max_draws=12 is less than the 12 base rollouts and 1 seeds that are drawn",
        ),
    ],
)
def test_a_shape_that_cannot_be_drawn_says_why(
    tmp_path: Path, num_rollouts: int, split: str, seeds: str, message: str
):
    overrides = [f"num_rollouts={num_rollouts}", f"split={split}", f"seeds={seeds}"]
    assert refusal(tmp_path, *(f"algorithm.{o}" for o in overrides)) == f"algorithm: {message}"


def test_a_shape_that_can_just_be_drawn_is_accepted():
    in_group = AlgorithmConfig(num_rollouts=2, split="1x1")
    assert in_group.num_base == in_group.num_seeds == 1
    extra = AlgorithmConfig(seeds="extra_draws", max_draws=5)
    assert extra.num_base + extra.num_seeds == 5
    with pytest.raises(ValueError, match="max_draws=4 is less than the 4 base rollouts and 1"):
        AlgorithmConfig(seeds="extra_draws", max_draws=4)


def test_without_resets_no_shape_is_too_small(tmp_path: Path):
    overrides = ["resets=none", "num_rollouts=1", "seeds=extra_draws", "max_draws=1"]
    cfg = load_config(written(tmp_path), [f"algorithm.{override}" for override in overrides])
    assert (cfg.algorithm.num_base, cfg.algorithm.num_seeds) == (1, 0)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "rollout.max_model_len=31",
            "config: rollout.max_model_len=31 is less than data.max_prompt_tokens + "
            "rollout.max_response_tokens = 32",
        ),
        (
            "rollout.max_model_len=47",
            "config: rollout.max_model_len=47 leaves no room to localize: a prompt, its response "
            "and localize.max_tokens make up to 48 tokens, and the template's own words",
        ),
        (
            "thoughts.max_tokens=25",
            "config: thoughts.max_tokens=25 is more than a whole response, "
            "rollout.max_response_tokens=24",
        ),
        ("optimizer.min_lr=1", "optimizer: min_lr=1.0 is larger than lr=1e-06"),
        ("eval.pass_at=[4]", "eval: pass_at=[4] needs one k at least, none above num_samples=1"),
        (
            "checkpoint={every: 10, keep_every: 15}",
            "checkpoint: keep_every=15 is not a multiple of every=10",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_name_both(tmp_path: Path, override: str, message: str):
    assert refusal(tmp_path, override) == message


@pytest.mark.parametrize("resets", ["self", "depth_matched"])
def test_rules_that_ask_the_policy_need_room_to_localize(tmp_path: Path, resets: str):
    overrides = ["rollout.max_model_len=47", f"algorithm.resets={resets}"]
    assert "leaves no room to localize" in refusal(tmp_path, *overrides)
    cfg = load_config(written(tmp_path), ["rollout.max_model_len=47", "algorithm.resets=random"])
    assert cfg.rollout.max_model_len == 47


def test_a_reward_is_given_up_before_the_watchdog_gives_up_the_run(tmp_path: Path):
    assert refusal(tmp_path, "reward_timeout_s=1800").endswith(
        "deadlines.reward_s=1800 must be longer than one attempt, reward_timeout_s=1800"
    )
    overrides = ["reward_timeout_s=1800", "deadlines.reward_s=1801"]
    assert load_config(written(tmp_path), overrides).reward_timeout_s == 1800


def test_a_nucleus_has_no_importance_weights(tmp_path: Path):
    overrides = ["rollout.top_p=0.95", "loss.importance=token_mask"]
    assert refusal(tmp_path, *overrides) == (
        "config: loss.importance=token_mask needs log-probs over the whole vocabulary: "
        "rollout.top_p must be 1, not 0.95"
    )
    assert load_config(written(tmp_path), overrides[:1]).rollout.top_p == 0.95


def test_an_evaluation_generates_something(tmp_path: Path):
    message = "eval: num_samples=0 and greedy=false: nothing is generated"
    assert refusal(tmp_path, "eval.num_samples=0") == message
    cfg = load_config(written(tmp_path), ["eval.num_samples=0", "eval.greedy=true"])
    assert cfg.eval.pass_at == (1,)  # of no responses: not asked for


@pytest.mark.parametrize(
    "override, message",
    [
        ("eval.sets.held_out=3", "eval.sets.held_out=3: Input should be a valid dictionary"),
        ("eval.sets.other={}", "eval.sets.other.data: Field required"),
        ("eval.sets.other={dta: x}", "unknown key 'eval.sets.other.dta'; did you mean"),
        ("eval.sets.a/b.data=x", "should match pattern"),
        ("eval.sets.mean.data=x", "eval: sets.mean: that is the name of the mean over all sets"),
        (
            "eval.sets.held_out.second_reward=boxed",
            "eval.sets.held_out: second_reward=boxed needs a `reward` beside it",
        ),
        (
            "eval.sets.held_out.answer_format=box it",
            "config: eval.sets.held_out.answer_format has no place: data.template does not name it",
        ),
    ],
)
def test_evaluation_sets_have_a_name_and_what_they_need(
    tmp_path: Path, override: str, message: str
):
    assert message in refusal(tmp_path, override)


def test_evaluation_sets_are_named_by_the_user_and_keep_their_order(tmp_path: Path):
    overrides = ["eval.sets.aime-24.data=a", "eval.sets.MATH_500={data: m, reward: boxed}"]
    sets = load_config(written(tmp_path), overrides).eval.sets
    assert [*sets] == ["held_out", "aime-24", "MATH_500"]
    assert sets["MATH_500"].reward == "boxed" and sets["aime-24"].reward is None
    left = load_config(written(tmp_path), [*overrides, "eval.sets.held_out=null"]).eval.sets
    assert [*left] == ["aime-24", "MATH_500"]


def test_lengths_that_just_fit_are_accepted(tmp_path: Path):
    cfg = load_config(written(tmp_path), ["rollout.max_model_len=48", "thoughts.max_tokens=24"])
    assert cfg.rollout.max_model_len == 48


@pytest.mark.parametrize(
    "template",
    [
        "{question}",
        "{}",
        "{0}",
        "{steps",
        "boxed{1}",
        "{prompt.text}",
        "{prompt[a]}",
        "{prompt!r}",
        "{prompt:{delimiter}}",
    ],
)
def test_a_template_with_a_wrong_field_names_the_right_ones(tmp_path: Path, template: str):
    for section, fields in (
        ("localize", "{prompt} {response} {steps}"),
        ("data", "{prompt} {answer_format} {delimiter}"),
    ):
        text = yaml.safe_dump(DEFAULTS | {section: {**DEFAULTS[section], "template": template}})
        message = refusal(tmp_path, text=text)
        assert message.startswith(f"{section}: template: ")
        assert fields in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "run_dir: Field required"),
        ("a: [", "expected node content"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("model: ${nowhere}", "Interpolation key 'nowhere' not found"),
        ("{model: '${seed}', seed: '${model}'}", "nterpolation"),
        ("just words", "just words"),
        ("- a\n- b\n", "must be a mapping"),
        ("3", "must be a mapping"),
    ],
    ids=["empty", "syntax", "duplicate", "interpolation", "cycle", "words", "list", "number"],
)
def test_a_file_that_is_no_mapping_of_keys_gets_one_line(tmp_path: Path, text: str, words: str):
    assert words in refusal(tmp_path, text=text)


def test_a_missing_key_is_named(tmp_path: Path):
    without = yaml.safe_dump({key: value for key, value in DEFAULTS.items() if key != "model"})
    assert refusal(tmp_path, text=without) == "model: Field required"


def test_an_override_must_look_like_one(tmp_path: Path):
    assert "'num_steps': must look like section.key=value" in refusal(tmp_path, "num_steps")


def test_a_config_file_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")


def test_the_config_stays_on_one_page():
    assert len([*field_names()]) <= 160


@pytest.mark.parametrize("template", ["hello", "{{prompt}}", "{answer_format}"])
def test_a_prompt_holds_the_question(tmp_path: Path, template: str):
    text = yaml.safe_dump(DEFAULTS | {"data": {**DEFAULTS["data"], "template": template}})
    message = "data: template: has no {prompt}: the policy would not be asked"
    assert refusal(tmp_path, text=text) == message


# --- every field is read -------------------------------------------------------------------------
#
# Types are followed by name: annotated parameters, fields and attributes, and names assigned from
# them. A read of `split` in the config's own property `num_suffixes` counts where that is read.

Types = dict[str, dict[str, str]]
"""class -> attribute -> class"""
Reads = set[tuple[str, str]]
"""(class, attribute)"""


def sources(without: str = "") -> list[ast.Module]:
    """A plan only foretells what the others do."""
    return [
        ast.parse(file.read_text())
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.name not in (*KNOBS, without) and file.parent.name != "plan"
    ]


def class_named(annotation: ast.expr | None) -> str:
    """`X` of `X`, `a.X`, `X | None` and "X"; '' for others."""
    if isinstance(annotation, ast.BinOp):
        return class_named(annotation.left)
    if isinstance(annotation, ast.Attribute):
        return annotation.attr
    if isinstance(annotation, ast.Constant):
        return str(annotation.value)
    return annotation.id if isinstance(annotation, ast.Name) else ""


@dataclass
class Reader(ast.NodeVisitor):
    """Collects which attributes of which classes a module reads."""

    types: Types
    reads: Reads = field(default_factory=set)
    scope: dict[str, str] = field(default_factory=dict)
    inside: str = ""
    """The class whose body is being read."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.inside = self.inside, node.name
        attributes = self.types.setdefault(node.name, {})
        for entry in node.body:
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                attributes[entry.target.id] = class_named(entry.annotation)
        self.generic_visit(node)
        self.inside = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.scope = self.scope, dict(self.scope)
        for parameter in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            self.scope[parameter.arg] = class_named(parameter.annotation)
        if self.inside:
            self.scope["self"] = self.inside
        self.generic_visit(node)
        self.scope = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, node.value)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other)
        elif isinstance(target, ast.Name):
            self.scope[target.id] = self.type_of(value)
        elif isinstance(target, ast.Attribute) and (owner := self.type_of(target.value)):
            self.types.setdefault(owner, {})[target.attr] = self.type_of(value)

    def type_of(self, expression: ast.expr) -> str:
        if isinstance(expression, ast.Name):
            return self.scope.get(expression.id, "")
        if isinstance(expression, ast.Attribute):
            return self.types.get(self.type_of(expression.value), {}).get(expression.attr, "")
        return ""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and (owner := self.type_of(node.value)):
            self.reads.add((owner, node.attr))


def config_types() -> tuple[Types, dict[tuple[str, str], Reads]]:
    """The sections' fields, and what each of the sections' properties reads."""
    reader, properties = Reader(types={}), {}
    modules = [ast.parse((PACKAGE / name).read_text()) for name in KNOBS]
    classes = [n for module in modules for n in module.body if isinstance(n, ast.ClassDef)]
    for node in classes:
        reader.visit_ClassDef(node)
    for node in classes:
        for entry in node.body:
            if isinstance(entry, ast.FunctionDef):
                own = Reader(types=reader.types, inside=node.name)
                own.visit_FunctionDef(entry)
                properties[node.name, entry.name] = own.reads
    return reader.types, properties


def reads_of(modules: list[ast.Module]) -> Reads:
    types, properties = config_types()
    # Twice, since a class may be used in an earlier file than the one that defines it.
    for _ in range(2):
        reads: Reads = set()
        for module in modules:
            reader = Reader(types=types, reads=reads)
            reader.visit(module)
    waiting = list(reads)
    while waiting:
        new = properties.get(waiting.pop(), set()) - reads
        reads |= new
        waiting.extend(new)
    return reads


def unread_fields(modules: list[ast.Module], root: type[Section] = Config) -> list[str]:
    """Dotted names of the fields that no module reads."""
    reads = reads_of(modules)

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        owners = [owner.__name__ for owner in section.__mro__]
        for name, info in section.model_fields.items():
            if not any((owner, name) in reads for owner in owners):
                yield prefix + name
            if inner := config_file._section_of(info.annotation):
                yield from walk(inner, f"{prefix}{name}.")

    return [*walk(root, "")]


def test_every_field_is_read_by_the_package():
    assert unread_fields(sources()) == []


def test_a_field_that_nothing_reads_would_be_found():
    class WithDummy(Config):
        dummy: int = 0

    assert unread_fields(sources(), WithDummy) == ["dummy"]


@pytest.mark.parametrize(
    "file, unread",
    [
        ("evaluate.py", {"eval.temperature"}),
        ("localize.py", {"localize.chat"}),
        ("retention.py", {"retention.num_samples", "retention.weight"}),
        ("telemetry.py", {"log.wandb", "log.wandb_project", "log.tensorboard"}),
        ("algorithm.py", {"algorithm.max_redraws"}),
        ("restarts.py", {"algorithm.reset_offset"}),
        ("sft.py", {"sft.num_steps"}),
        ("inputs.py", {"sft.data"}),
        ("held_out.py", {"eval.sets.data", "eval.sets.reward"}),
    ],
)
def test_leaving_out_the_file_that_reads_a_field_makes_it_unread(file: str, unread: set[str]):
    assert unread <= set(unread_fields(sources(without=file)))


def test_all_sections_are_looked_at():
    names: Mapping[str, None] = dict.fromkeys(field_names())
    assert {"sft.optimizer.lr", "algorithm.split", "data.train", "retention.weight"} <= set(names)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer.offload_fraction=0.5"], "offload_fraction=0.5 needs dtype=bfloat16"),
        (
            [
                "optimizer.offload_fraction=0.5",
                "dtype=bfloat16",
                "fp8.recipe=tensorwise",
                "fp8.param_gather=true",
            ],
            "offload_fraction does not go with fp8.param_gather",
        ),
        (
            ["sft.run_dir=r", "sft.model=m", "sft.data=d", "sft.optimizer.offload_fraction=0.5"],
            "sft.optimizer.offload_fraction=0.5 needs dtype=bfloat16",
        ),
        (["colocation.park=[weights,weights]"], "names something twice"),
    ],
)
def test_memory_that_could_not_be_moved_is_refused(
    tmp_path: Path, overrides: list[str], message: str
):
    assert message in refusal(tmp_path, *overrides)
