"""Named places in a syntax tree, and the proof that lines added there change nothing else.

A place is always before or after a whole statement that shares its lines with nothing, so that a line can go there.
"""

from __future__ import annotations

import ast
import builtins
import warnings
from collections.abc import Iterator, Sequence

from vla_energy.hosts.patch_file import Anchor

Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)


class AnchorError(ValueError):
    """A place cannot be found, or a line cannot stand there."""


def parse(source: bytes) -> ast.Module:
    """The syntax tree of a file in UTF-8.

    Raises:
        AnchorError: it is not UTF-8, or no Python.
    """
    try:
        source.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the host's own invalid escapes are not our matter
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise AnchorError(f"cannot be parsed as Python in UTF-8: {error}") from error


def locate(tree: ast.Module, lines: list[bytes], anchor: Anchor) -> tuple[int, bytes]:
    """Where an anchor stands.

    Args:
        tree: of the file.
        lines: of the file, with their ends.
        anchor: to find.

    Returns:
        The line after which to insert (0: before the first), and the white space to begin with.

    Raises:
        AnchorError: there is no such place, or several, or it shares a line with something else.
    """
    found = _candidates(_scope(tree, anchor.scope), anchor)
    if len(found) != 1:
        where = ", ".join(str(statement.lineno) for statement in found)
        count = f"it is there {len(found)} times (lines {where})" if found else "there is none"
        raise AnchorError(f"no place {anchor}: {count}")
    statement = found[0]
    assert statement.end_lineno is not None and statement.end_col_offset is not None
    indent = lines[statement.lineno - 1][: statement.col_offset]
    rest = lines[statement.end_lineno - 1][statement.end_col_offset :].strip()
    if indent.strip() or (rest and not rest.startswith(b"#")):
        raise AnchorError(f"no place {anchor}: it shares line {statement.lineno} with another statement")
    return (statement.end_lineno if anchor.place == "after" else statement.lineno - 1), indent


def verify(original: bytes, patched: bytes, added: set[int]) -> None:
    """Checks that a file with added lines is the old program plus these statements, and that they can run there.

    Args:
        original: the file.
        patched: with the added lines.
        added: their numbers, from 1.

    Raises:
        AnchorError: the result does not parse or differs in more, a name that an added line reads is not defined before
            it, or a name that it introduces is in use there already.
    """
    tree = parse(patched)
    new = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno in added]
    for statement in new:
        _check_names(tree, statement, added)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(block := getattr(node, field, None), list):
                block[:] = [child for child in block if getattr(child, "lineno", 0) not in added]
    if len(new) != len(added) or ast.dump(tree) != ast.dump(parse(original)):
        raise AnchorError("the added lines would change more than they add")


def _scope(tree: ast.Module, name: str) -> Scope:
    scope: Scope = tree
    for part in name.split(".") if name else ():
        found = [node for node in scope.body if isinstance(node, _DEFINITIONS) and node.name == part]
        if len(found) != 1:
            raise AnchorError(f"no place in {name}: there are {len(found)} definitions of {part}, expected 1")
        scope = found[0]
    return scope


def _candidates(scope: Scope, anchor: Anchor) -> Sequence[ast.stmt]:
    if anchor.kind == "imports":
        heading = []
        for node in scope.body:
            if isinstance(node, _DEFINITIONS):
                break
            heading.append(node)
        return [node for node in heading if isinstance(node, (ast.Import, ast.ImportFrom))][-1:]
    if anchor.kind == "last field":
        return [node for node in scope.body if isinstance(node, ast.AnnAssign)][-1:]
    statements = list(_simple_statements(scope))
    if anchor.kind == "assignment":
        return [node for node in statements if anchor.name in _targets(node)]
    leaving = _LEAVING if anchor.place == "after" else ()  # what follows these is never reached
    return [node for node in statements if anchor.name in _calls(node) and not isinstance(node, leaving)]


def _simple_statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a scope that hold no others; those of functions and classes inside are not its own."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            continue
        if isinstance(child, ast.stmt) and not hasattr(child, "body") and not hasattr(child, "cases"):
            yield child
        elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _simple_statements(child)


def _targets(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    return {
        ast.unparse(node)
        for target in targets
        for node in ast.walk(target)
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store)
    }


def _calls(statement: ast.stmt) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)}


def _check_names(tree: ast.Module, statement: ast.stmt, added: set[int]) -> None:
    """What the statement reads is defined before it, and what it introduces is new."""
    chain = _enclosing(tree, statement.lineno)
    where = getattr(chain[-1], "name", "the module")
    own, module = _bindings(chain[-1]), _bindings(tree)
    is_function = isinstance(chain[-1], (ast.FunctionDef, ast.AsyncFunctionDef))
    loaded = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for name in sorted(loaded):
        # A name that a function binds anywhere is local all over it; a class or module falls back to what is outside.
        if name in own and (is_function or min(own[name]) < statement.lineno):
            known = min(own[name]) < statement.lineno
        elif is_function:
            known = any(name in _bindings(scope) for scope in chain[:-1] if not isinstance(scope, ast.ClassDef))
        else:
            known = min(module.get(name, [statement.lineno])) < statement.lineno
        if not (known or hasattr(builtins, name) or "*" in module):
            raise AnchorError(
                f"an added line reads {name}, which is not defined before line {statement.lineno} in {where}"
            )
    for name in sorted(set(_bindings(statement)) - loaded):
        scopes = [own, module] if is_function else [own]
        if taken := [line for scope in scopes for line in scope.get(name, ()) if line not in added]:
            raise AnchorError(f"an added line would define {name}, which line {taken[0]} defines already")


def _enclosing(tree: ast.Module, line: int) -> list[Scope]:
    """The scopes around a line, outermost first."""
    chain: list[Scope] = [tree]
    for node in ast.walk(tree):  # outer ones come before inner ones
        if isinstance(node, _DEFINITIONS) and node.lineno < line <= (node.end_lineno or 0):
            chain.append(node)
    return chain


def _bindings(scope: ast.AST) -> dict[str, list[int]]:
    """Names that a scope binds, with the lines; `*` for a star import. Comprehensions keep theirs to themselves."""
    found: dict[str, list[int]] = {}
    whole = isinstance(scope, ast.stmt) and not isinstance(scope, _DEFINITIONS)
    stack: list[ast.AST] = [scope] if whole else list(ast.iter_child_nodes(scope))
    while stack:
        node = stack.pop()
        name = None
        if isinstance(node, ast.Name):
            name = node.id if isinstance(node.ctx, ast.Store) else None
        elif isinstance(node, ast.alias):
            name = node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, (*_DEFINITIONS, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            name = node.name
        if name is not None:
            found.setdefault(name, []).append(node.lineno)  # type: ignore[attr-defined]
        if not isinstance(node, (*_DEFINITIONS, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            stack.extend(ast.iter_child_nodes(node))
    return found
