"""Whether an in-place op on a skip was meant, read from real source files."""

from __future__ import annotations

import linecache
import textwrap
from pathlib import Path

import pytest

from gradflow.recording.overwritten import Frame, describe_overwrite

INNER: Frame = ("/elsewhere/library.py", 7, "forward")
"""A user frame below the adding forward, as of a block in another file."""


def frame_of(path: Path, mark: str) -> Frame:
    """The frame at the line that ends in ``# mark``; its function is the nearest def above."""
    lines = path.read_text().splitlines()
    line = next(
        i for i, text in enumerate(lines) if text.split("#")[-1].strip().startswith(mark) and "#" in text
    )
    name = next((t.split("(")[0].split()[-1] for t in lines[line::-1] if t.lstrip().startswith("def ")), "")
    return str(path), line + 1, name


def rebound(tmp_path: Path, body: str, *, left: bool | None = True) -> bool | None:
    """Judge a forward whose op's line ends in ``# op`` and whose add's line ends in ``# add``."""
    path = tmp_path / "model.py"
    text = textwrap.indent(textwrap.dedent(body), " " * 8)
    path.write_text(f"class Block:\n    def forward(self, x, y=None):\n{text}")
    linecache.clearcache()
    both = "# op add" in body
    op, add = (frame_of(path, "op add"),) * 2 if both else (frame_of(path, "op"), frame_of(path, "add"))
    found = describe_overwrite(op="relu", name="block.act", frames=(INNER, op), add=add, skip_is_left=left)
    assert (found.op, found.name) == ("relu", "block.act")
    return found.rebound


MEANT = {
    "the skip's own name": """
        x = self.act(x)  # op
        return x + self.f(x)  # add
        """,
    "an alias made after it": """
        x = self.act(x)  # op
        identity = x
        x = self.f(x)
        x += identity  # add
        """,
    "an alias of an alias": """
        h = self.act(x)  # op
        skip = h
        identity = skip.to(h.dtype)
        return identity + self.f(h)  # add
        """,
    "a shortcut computed after it": """
        x = self.act(x)  # op
        identity = x
        if self.down is not None:
            identity = self.down(x)
        out = self.f(x)
        return identity + out  # add
        """,
    "two targets": """
        identity = x = self.act(x)  # op
        return identity + self.f(x)  # add
        """,
    "a tuple target": """
        x, y = self.act(x), self.other(y)  # op
        return x + self.f(x)  # add
        """,
    "a walrus": """
        if (x := self.act(x)) is not None:  # op
            return x + self.f(x)  # add
        """,
    "an augmented assignment": """
        x += self.bias  # op
        return x + self.f(x)  # add
        """,
    "an attribute": """
        self.state = self.act(self.state)  # op
        return self.state + self.f(self.state)  # add
        """,
    "an annotated target": """
        x: Tensor = self.act(x)  # op
        return x + self.f(x)  # add
        """,
    "a statement of its own": """
        x.relu_()  # op
        return x + self.f(x)  # add
        """,
    "several lines": """
        x = self.act(
            x,  # op
        )
        return torch.add(
            x,  # add
            self.f(x),
        )
        """,
    "after the add in a loop": """
        for f in self.fs:
            x = x + f(x)  # add
            x = self.act(x)  # op
        return x
        """,
    "after the add: an earlier call of this forward": """
        out = self.f(x)
        out += x  # add
        return self.act(out)  # op
        """,
}
BUGS = {
    "a branch in the add": """
        return x + self.f(self.act(x))  # op add
        """,
    "the sum's name is not the op's": """
        x = x + self.body(x)  # op add
        return x
        """,
    "augmented by a branch": """
        x += self.body(x)  # op add
        return x
        """,
    "a branch before the add": """
        out = self.body(x)  # op
        return x + out  # add
        """,
    "torch.add": """
        out = self.body(x)  # op
        return torch.add(x, out)  # add
        """,
    "a method": """
        out = self.body(x)  # op
        return x.add(out)  # add
        """,
    "an alias made before it": """
        identity = x
        x = self.act(x)  # op
        return identity + self.f(x)  # add
        """,
    "a name of its own": """
        h = self.act(x)  # op
        return x + self.f(h)  # add
        """,
    "several lines": """
        out = self.conv(
            self.act(x)  # op
        )
        return (
            x  # add
            + self.norm(out)
        )
        """,
    "in a loop": """
        for f in self.fs:
            out = f(x)  # op
            x = x + out  # add
        return x
        """,
    "a sum of three": """
        a = self.f(self.act(x))  # op
        return x + a + self.g(x)  # add
        """,
    "printed": """
        print(self.body(x))  # op
        return x + self.f(x)  # add
        """,
}


@pytest.mark.parametrize("body", MEANT.values(), ids=MEANT)
def test_bound_again_to_the_name_of_the_skip(tmp_path: Path, body: str) -> None:
    left = not ("+= identity" in body or "out += x" in body)
    assert rebound(tmp_path, body, left=left) is True


@pytest.mark.parametrize("body", BUGS.values(), ids=BUGS)
def test_behind_the_back_of_the_skip(tmp_path: Path, body: str) -> None:
    assert rebound(tmp_path, body) is False


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("out = self.body(x)  # op\nout += x  # add\n", False),
        ("out = self.body(x)  # op\nreturn out + x  # add\n", False),
        ("out = self.body(x)  # op\nreturn out.add_(x)  # add\n", False),
        ("return self.f(self.act(x)) + x  # op add\n", False),
        ("return self.f(self.act(x)) + x  # op add\n", None),
        ("return x + self.f(self.act(x))  # op add\n", None),
    ],
)
def test_the_skip_on_the_right_or_unknown(tmp_path: Path, body: str, left: bool | None) -> None:
    assert rebound(tmp_path, body, left=left) is False


def test_an_open_question_is_not_answered(tmp_path: Path) -> None:
    two_names = "out = self.body(x)  # op\nreturn x + out  # add\n"
    assert rebound(tmp_path, two_names, left=None) is None
    own_result = "return self.act(x) + self.f(x)  # op add\n"
    assert rebound(tmp_path, own_result) is None
    not_an_add = "out = self.body(x)  # op\nreturn self.sum(x, out)  # add\n"
    assert rebound(tmp_path, not_an_add) is None


def test_the_statement_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("def forward(self, x):\n    out = self.body(\n        x\n    )\n    return x + out\n")
    frames = (INNER, (str(path), 3, "forward"))
    found = describe_overwrite(
        op="relu", name="", frames=frames, add=(str(path), 5, "forward"), skip_is_left=True
    )
    assert (found.source, found.rebound) == ("net.py:2", False)


def test_a_lambda(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("block = lambda x: x + f(act(x))\n")
    at = (str(path), 1, "<lambda>")
    assert describe_overwrite(op="relu", name="", frames=(at,), add=at, skip_is_left=True).rebound is False


@pytest.mark.parametrize(
    ("frames", "add"),
    [
        ((("<stdin>", 3, "forward"),), ("<stdin>", 4, "forward")),  # typed in or built by exec
        ((INNER,), None),
        ((), ("model.py", 4, "forward")),
    ],
)
def test_no_source(frames: tuple[Frame, ...], add: Frame | None) -> None:
    found = describe_overwrite(op="relu", name="act", frames=frames, add=add, skip_is_left=True)
    assert (found.source, found.rebound) == ("", None)


def test_text_that_is_not_python(tmp_path: Path) -> None:
    path = tmp_path / "cell.py"
    path.write_text("%magic\nx + f(x)\n")
    at = (str(path), 2, "forward")
    assert describe_overwrite(op="relu", name="", frames=(at,), add=at, skip_is_left=True).rebound is None


def test_the_add_in_a_helper_that_was_not_on_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("def join(a, b):\n    return a + b\n\ndef forward(x):\n    return join(x, body(x))\n")
    found = describe_overwrite(
        op="relu",
        name="",
        frames=((str(path), 5, "forward"),),
        add=(str(path), 2, "join"),
        skip_is_left=True,
    )
    assert found.rebound is None
