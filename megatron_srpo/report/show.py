"""What became of a prompt, in a terminal?   run folder, step, prompt -> the tree of the page"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.console import Group as Stacked
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Drawn

from megatron_srpo.report.record import RunRecord, read_groups, read_runs
from megatron_srpo.report.tree import Branch, Tree, trees
from megatron_srpo.types import InputError, Reset

SIGNS = {"pass": ("✓ pass", "green"), "fail": ("✗ fail", "red"), "none": ("? no verdict", "yellow")}
LEFT_OUT = {"seeds": "not trained: search for a failed one", "replaced": "not trained: drawn anew"}


def show(root: Path, *, step: int | None, prompt: str | None, console: Console) -> None:
    """`prompt` is an id or a place in the step, from 1; without one, the step's prompts are listed.

    The last step, if none is named. Raises `InputError` for what is not on record.
    """
    (run,) = read_runs([root])
    if not run.steps:
        raise InputError(f"{run.folder.rollouts}: no rollouts are on record")
    step = run.steps[-1] if step is None else step
    if step not in run.steps:
        known = f"{run.steps[0]} to {run.steps[-1]}"
        raise InputError(f"{run.folder.rollouts}: no rollouts of step {step}; there are {known}")
    groups, damage = read_groups(run, step)
    if damage:
        raise InputError(damage)
    grown = trees(groups, run.cfg)
    if prompt is None:
        for place, tree in enumerate(grown, start=1):
            console.print(_row(place, tree), soft_wrap=True)
        return
    tree = _chosen(grown, prompt, step, run)
    console.print(drawn(tree, step=step), soft_wrap=False)


def _chosen(grown: list[Tree], prompt: str, step: int, run: RunRecord) -> Tree:
    for tree in grown:
        if tree.prompt.id == prompt:
            return tree
    if not prompt.isdigit() or not 0 < int(prompt) <= len(grown):
        raise InputError(
            f"{run.folder.root}: step {step} has no prompt {prompt!r}; name an id, or a number "
            f"from 1 to {len(grown)}"
        )
    return grown[int(prompt) - 1]


def _row(place: int, tree: Tree) -> Text:
    """A line of the list: place, id, verdicts, question."""
    row = Text(f"{place:>4}  {tree.prompt.id}  ")
    for branch in tree.branches:
        _mark(row, branch)
    return row.append("  " + " ".join(tree.prompt.text.split()), style="dim")


def _mark(row: Text, branch: Branch) -> None:
    sign, colour = SIGNS[branch.verdict]
    row.append(sign[0], style=colour)
    if branch.reset is not None and branch.reset.thought is not None:
        row.append(f"↶{branch.reset.thought + 1}")
    if branch.suffixes:
        row.append("(")
        for suffix in branch.suffixes:
            _mark(row, suffix)
        row.append(")")


def drawn(tree: Tree, *, step: int) -> Drawn:
    """Texts of rollouts are texts, not markup."""
    prompt = tree.prompt
    head = Text(f"{prompt.id}, step {step}\n", style="bold")
    head.append(prompt.text.rstrip() + "\n", style="not bold")
    head.append(f"answer {prompt.answer}", style="not bold dim")
    root = Drawn(head, guide_style="dim")
    for branch in sorted(tree.branches, key=lambda branch: branch.reset is None):
        _grow(root, branch)
    return root


def _grow(under: Drawn, branch: Branch) -> None:
    node = under.add(_drawn(branch))
    for suffix in branch.suffixes:
        _grow(node, suffix)


def _drawn(branch: Branch) -> Stacked:
    thoughts = Table.grid(padding=(0, 1))
    for number in range(len(branch.rollout.thoughts)):
        thoughts.add_row(*_thought(branch, number))
    reset = _reset(branch.reset) if branch.reset is not None else []
    return Stacked(_head(branch), thoughts, *reset)


def _head(branch: Branch) -> Text:
    sign, colour = SIGNS[branch.verdict]
    head = Text(sign, style=f"bold {colour}").append(f"  {branch.name}", style="not bold default")
    words = [f"reward {branch.rollout.score.value:g}"]
    if branch.credit:
        words.append(f"advantage {branch.credit[-1][2]:+.3g}")
    if branch.group.use != "train":
        words.append(LEFT_OUT[branch.group.use])
    elif not branch.group.has_signal:
        words.append("= group without signal")
    if branch.rollout.finish_reason == "length":
        words.append("cut by length")
    if branch.rollout.score.failure is not None:
        words.append(f"no verdict: {branch.rollout.score.failure}")
    return head.append("  " + " · ".join(words), style="not bold default")


def _thought(branch: Branch, number: int) -> tuple[Text, Text]:
    """Number and text: copied ones in grey, marked with |; the blamed one with its sign."""
    is_copied = number < branch.num_copied_thoughts
    style = "dim italic" if is_copied else ""
    place = Text(f"{number + 1:>3}{'|' if is_copied else '.'}", style=style)
    text = Text(branch.rollout.thoughts[number].text.rstrip("\n"), style=style)
    reset = branch.reset
    if reset is not None and reset.thought is not None:
        named = reset.thought if reset.moved_from is None else reset.moved_from
        if number == named:
            text.append("   ↶ blamed", style="bold yellow")
        if number == reset.thought != named:
            text.append("   ↶ reset moved here", style="yellow")
    return place, text


def _reset(reset: Reset) -> list[Text]:
    where = (
        "nothing was reset"
        if reset.thought is None
        else f"back to before thought {reset.thought + 1}"
    )
    said = [Text(f"↶ {where} ({reset.cause})", style="bold")]
    if reset.answer:
        said.append(Text("the policy said: ").append(reset.answer.strip(), style="italic"))
    return said
