"""Whether an in-place op that wrote over a skip was meant: read from the source of the adding forward.

``x = act_(x); x + f(x)`` and ``x + f(act_(x))`` run the same ops. What tells them apart is a name: the first
binds the result to the name that the skip has in the add, so whoever reads it sees the skip change; the
second changes it behind the reader's back.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from gradflow.trace_model import OverwrittenSkip

Frame = tuple[str, int, str]
"""File name, line number and function name of one frame."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_ADD_CALLS = frozenset(("add", "add_", "iadd", "sub", "sub_"))
_ADD_OPERATORS = (ast.Add, ast.Sub)
_ALIAS_STEPS = 20
"""More renamings of the skip than this are not followed."""


def describe_overwrite(
    *, op: str, name: str, frames: Sequence[Frame], add: Frame | None, skip_is_left: bool | None
) -> OverwrittenSkip:
    """Say whether the statement that ran an in-place op binds its result to the skip's own name.

    Args:
        op: The in-place op ("relu").
        name: Fully qualified name of the module that ran it.
        frames: The user's frames when it ran, innermost first. The op ran during the call whose forward adds.
        add: The innermost user frame of the add.
        skip_is_left: Which operand of the add is the skip; None where that is not known.

    Returns:
        ``rebound`` is None where there is no source, where the adding function was not on the stack, or where
        its text does not say which operand is the skip.
    """
    statement, rebound = _judge(frames, add, skip_is_left) if add is not None else (0, None)
    source = f"{Path(add[0]).name}:{statement}" if add is not None and statement else ""
    return OverwrittenSkip(op=op, name=name, source=source, rebound=rebound)


def _judge(frames: Sequence[Frame], add: Frame, skip_is_left: bool | None) -> tuple[int, bool | None]:
    """The line of the statement, 0 where there is none, and the verdict."""
    text = "".join(linecache.getlines(add[0]))
    lines = tuple(line for file, line, name in frames if (file, name) == (add[0], add[2]))
    return _judge_text(text, lines, add[1], add[2], skip_is_left)


@lru_cache(maxsize=1024)
def _judge_text(
    text: str, lines: tuple[int, ...], add: int, name: str, skip_is_left: bool | None
) -> tuple[int, bool | None]:
    function = _function_at(_tree(text), add, name)
    line = next((line for line in lines if function is not None and _holds(function, line)), 0)
    if function is None or not line:
        return 0, None
    adding, running = _statement_at(function, add), _statement_at(function, line)
    operand = _skip_operand(adding, add, skip_is_left)
    if operand is None:
        return running.lineno, None
    if running is adding:
        return running.lineno, _bound_inside(running, operand, function)
    if running.lineno > adding.lineno and not _in_one_loop(function, running, adding):
        return running.lineno, True  # an earlier call of the same function: this one saw only the new values
    return running.lineno, _bound_before(function, running, adding, operand)


@lru_cache(maxsize=64)
def _tree(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _function_at(tree: ast.Module, line: int, name: str) -> _Function | None:
    """The innermost function of that name that holds the line."""
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, _Function) and getattr(node, "name", "<lambda>") == name and _holds(node, line)
    ]
    return max(found, key=lambda node: node.lineno, default=None)


def _holds(node: ast.AST, line: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return first is not None and last is not None and first <= line <= last


def _statement_at(function: _Function, line: int) -> ast.stmt | ast.Lambda:
    """The innermost statement that holds the line; a lambda is its own."""
    if isinstance(function, ast.Lambda):
        return function
    holding = [node for node in _statements(function) if _holds(node, line)]
    return holding[-1] if holding else function.body[0]


def _statements(function: _Function) -> list[ast.stmt]:
    """All statements inside a function, outer before inner."""
    return [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]


def _in_one_loop(function: _Function, *inside: ast.AST) -> bool:
    loops = (n for n in ast.walk(function) if isinstance(n, ast.For | ast.While | ast.AsyncFor))
    return any(all(_holds(loop, getattr(node, "lineno", 0)) for node in inside) for loop in loops)


def _skip_operand(adding: ast.AST, line: int, skip_is_left: bool | None) -> ast.expr | None:
    """The skip as it is written in the add; None where the text leaves it open."""
    adds = [pair for node in ast.walk(adding) if _holds(node, line) and (pair := _operands(node))]
    if not adds:
        return None
    left, right = adds[0]
    if skip_is_left is not None:
        operand = left if skip_is_left else right
        while inner := _operands(operand):  # x + a + b
            operand = inner[0] if skip_is_left else inner[1]
        return operand
    # Not known: a bare name beside something computed on the spot is the skip.
    plain = [
        operand for operand in (left, right) if not any(isinstance(n, ast.Call) for n in ast.walk(operand))
    ]
    return plain[0] if len(plain) == 1 else None


def _operands(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """The two operands of an add, however it is written."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, _ADD_OPERATORS):
        return node.left, node.right
    if isinstance(node, ast.AugAssign) and isinstance(node.op, _ADD_OPERATORS):
        return node.target, node.value
    if not isinstance(node, ast.Call) or not node.args:
        return None
    if not isinstance(node.func, ast.Attribute | ast.Name):
        return None
    called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
    if called not in _ADD_CALLS:
        return None
    if len(node.args) > 1:  # torch.add(x, y)
        return node.args[0], node.args[1]
    return (node.func.value, node.args[0]) if isinstance(node.func, ast.Attribute) else None  # x.add(y)


def _bound_inside(running: ast.AST, operand: ast.expr, function: _Function) -> bool | None:
    """The op ran within the add's own statement, whose target receives the sum and not the op's result."""
    if set(_walrus_targets(running)) & _names(operand, function):
        return True
    computed = any(isinstance(node, ast.Call) for node in ast.walk(operand))
    return None if computed else False


def _bound_before(function: _Function, running: ast.AST, adding: ast.AST, operand: ast.expr) -> bool | None:
    skips = _names(operand, function)
    if not skips:
        return None
    for before in reversed(_bindings_between(function, running, adding)):
        # ``identity = x`` after the op: the skip's name stands for what x had become.
        for target, value in _pairs(before):
            if target in skips:
                skips = (skips - {target}) | _names(value, function)
    return bool(skips & set(_targets(running))) or _is_bare_call_on(running, skips, function)


def _bindings_between(function: _Function, running: ast.AST, adding: ast.AST) -> list[ast.stmt]:
    start, end = getattr(running, "end_lineno", 0), getattr(adding, "lineno", 0)
    between = [s for s in _statements(function) if s.lineno > start and s.lineno < end and s is not adding]
    return sorted(between, key=lambda statement: statement.lineno)[-_ALIAS_STEPS:]


def _pairs(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Each name that a plain assignment binds, with what it is bound to."""
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        yield from ((name, statement.value) for name in _flat(statement.target))
    if not isinstance(statement, ast.Assign):
        return
    for target in statement.targets:
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            for part, value in zip(target.elts, statement.value.elts, strict=False):
                yield from ((name, value) for name in _flat(part))
        else:
            yield from ((name, statement.value) for name in _flat(target))


def _targets(statement: ast.AST) -> Iterator[str]:
    """Every name that a statement binds."""
    if isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from _flat(target)
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign | ast.For | ast.AsyncFor):
        yield from _flat(statement.target)
    elif isinstance(statement, ast.With | ast.AsyncWith):
        for item in statement.items:
            yield from _flat(item.optional_vars) if item.optional_vars else ()
    yield from _walrus_targets(statement)


def _walrus_targets(statement: ast.AST) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.NamedExpr):
            yield node.target.id


def _flat(target: ast.expr) -> Iterator[str]:
    """The names in a target: of ``(x, self.y)`` both."""
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _flat(part)
    elif isinstance(target, ast.Starred):
        yield from _flat(target.value)
    else:
        yield ast.unparse(target)


def _is_bare_call_on(statement: ast.AST, skips: Iterable[str], function: _Function) -> bool:
    """``x.relu_()`` as a statement of its own: a result thrown away says that the change was the purpose."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    call = statement.value
    receiver = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return any(ast.unparse(operand) in skips for operand in (*receiver, *call.args))


def _names(operand: ast.expr, function: _Function) -> set[str]:
    """The local names that an expression's value may come from; ``self.state`` counts as one name."""
    local = _locals(function)
    called = {id(node.func) for node in ast.walk(operand) if isinstance(node, ast.Call)}
    found = set()
    owner = function.args.args[0].arg if function.args.args else ""
    for node in ast.walk(operand):
        if isinstance(node, ast.Attribute | ast.Subscript) and id(node) not in called:
            found.add(ast.unparse(node))
        if isinstance(node, ast.Name) and node.id in local and node.id != owner:
            found.add(node.id)
    if isinstance(operand, ast.Name):
        found.add(operand.id)
    return found


def _locals(function: _Function) -> set[str]:
    arguments = function.args
    names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    bound = (n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return names | {node.id for node in bound}
