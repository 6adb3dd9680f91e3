"""The rules, in one plain tuple: a new rule is one file and one line here."""

from __future__ import annotations

from difflib import get_close_matches

from gradflow.errors import UsageError
from gradflow.rules.gf101_vanishing_gradient import RULE as GF101
from gradflow.rules.gf102_exploding_gradient import RULE as GF102
from gradflow.rules.gf103_no_gradient import RULE as GF103
from gradflow.rules.gf104_non_finite_gradient import RULE as GF104
from gradflow.rules.gf105_low_precision_underflow import RULE as GF105
from gradflow.rules.gf106_shattered_gradient import RULE as GF106
from gradflow.rules.gf201_near_identity_block import RULE as GF201
from gradflow.rules.gf202_residual_growth import RULE as GF202
from gradflow.rules.gf203_overwritten_skip import RULE as GF203
from gradflow.rules.gf204_dead_branch import RULE as GF204
from gradflow.rules.gf205_norm_placement import RULE as GF205
from gradflow.rules.gf206_diminishing_depth import RULE as GF206
from gradflow.rules.gf207_shortcut_shape import RULE as GF207
from gradflow.rules.gf301_dead_units import RULE as GF301
from gradflow.rules.gf302_saturated_units import RULE as GF302
from gradflow.rules.gf303_non_finite_activation import RULE as GF303
from gradflow.rules.gf304_collapsed_representation import RULE as GF304
from gradflow.rules.gf305_attention_collapse import RULE as GF305
from gradflow.rules.gf401_update_ratio import RULE as GF401
from gradflow.rules.gf402_lost_update import RULE as GF402
from gradflow.rules.gf403_batch_norm_batch import RULE as GF403
from gradflow.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    GF101,
    GF102,
    GF103,
    GF104,
    GF105,
    GF106,
    GF201,
    GF202,
    GF203,
    GF204,
    GF205,
    GF206,
    GF207,
    GF301,
    GF302,
    GF303,
    GF304,
    GF305,
    GF401,
    GF402,
    GF403,
)


def find_rule(code: str) -> Rule:
    """Return the rule with this code or slug, in any case.

    Raises:
        UsageError: There is none; the sentence names the nearest.
    """
    wanted = code.strip().lower()
    for rule in RULES:
        if wanted in (rule.code.lower(), rule.slug):
            return rule
    near = nearest(wanted, [name for rule in RULES for name in (rule.code, rule.slug)])
    raise UsageError(f"no rule is called {code!r}; did you mean {near}? `gradflow rules` lists them all.")


def select_rules(select: tuple[str, ...], ignore: tuple[str, ...]) -> tuple[Rule, ...]:
    """Return the rules that may speak, in their order; ``ignore`` wins over ``select``.

    Args:
        select: Codes ("GF101") or prefixes of codes ("GF1"), in any case.
        ignore: The same.

    Raises:
        UsageError: A selector matches no rule; the sentence names the nearest that does.
    """
    chosen = {rule.code for selector in select for rule in _matching(selector)}
    dropped = {rule.code for selector in ignore for rule in _matching(selector)}
    return tuple(rule for rule in RULES if rule.code in chosen - dropped)


def find_threshold(name: str) -> str:
    """Return the full name of a threshold that a configuration can move, in any case.

    Args:
        name: "GF101.gain.error".

    Raises:
        UsageError: There is none; the sentence names the nearest.
    """
    known = {full.lower(): full for rule in RULES for full in rule.settings}
    if name.strip().lower() in known:
        return known[name.strip().lower()]
    near = nearest(name.strip(), list(known.values()))
    raise UsageError(
        f"there is no threshold {name!r}; did you mean {near}? `gradflow explain {near.partition('.')[0]}` lists "
        "its thresholds"
    )


def nearest(wanted: str, names: list[str]) -> str:
    """Return the name that is most like what was wanted."""
    lowered = {name.lower(): name for name in names}
    return lowered[get_close_matches(wanted.lower(), list(lowered), n=1, cutoff=0.0)[0]]


def _matching(selector: str) -> tuple[Rule, ...]:
    prefix = selector.strip().upper()
    found = tuple(rule for rule in RULES if prefix and rule.code.startswith(prefix))
    if not found:
        raise UsageError(
            f"{selector!r} selects no rule; did you mean {_near(prefix)}? A selector is a code (GF101) or the start "
            "of one (GF1), and `gradflow rules` lists them all."
        )
    return found


def _near(prefix: str) -> str:
    """The code most like it; of the start of a code, every family of rules."""
    codes = [rule.code for rule in RULES]
    if prefix.startswith("GF") and len(prefix) <= len("GF1"):
        return ", ".join(dict.fromkeys(code[: len("GF1")] for code in codes))
    return nearest(prefix, codes)
