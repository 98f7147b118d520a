r"""The value of a small LaTeX or plain formula, read by a parser of its own: what a model writes is never executed.

sum      = product (("+" | "-") product)*
product  = signed (("*" | "/" | nothing) signed)*
signed   = ("+" | "-") signed | power
power    = atom ("!" | "%")* ("^" signed)?
atom     = number | variable | "(" sum ")" | function atom | \frac atom atom | \sqrt ("[" sum "]") atom
"""

import cmath
import math
import re
from collections.abc import Callable, Mapping
from random import Random

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\*\*|[a-zA-Z]|[-+*/^(){}\[\]!%|])")
_NAMES = {"pi": math.pi, "infty": math.inf}
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "ln": cmath.log,
    "log": cmath.log10,
    "exp": cmath.exp,
}
_SIGNS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "**": "^", "{": "(", "}": ")", "[": "(", "]": ")"}
_POINTS = 3
_LONGEST = 400


class UnreadableError(ValueError):
    """Not a formula that can be read, or one without a finite value."""


def same_value(first: str, second: str) -> bool:
    """Whether two formulas agree to nine digits wherever they are tried.

    Raises:
        UnreadableError: for what cannot be read or has no value.
    """
    rng = Random(0)
    readers = [_Reader(text) for text in (first, second)]
    names = sorted({name for reader in readers for name in reader.variables})
    for _ in range(_POINTS):
        values = {name: complex(rng.uniform(0.5, 2.0)) for name in names}
        a, b = (reader.value(values) for reader in readers)
        near = cmath.isfinite(a) and cmath.isfinite(b) and abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))
        if a != b and not near:
            return False
    return True


class _Reader:
    """A formula cut into tokens, evaluated by recursive descent."""

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise UnreadableError("too long")
        text = re.sub(r"(?<![\\a-zA-Z])(sqrt|pi)(?![a-zA-Z])", r"\\\1", text)
        self.tokens: list[str] = []
        place = 0
        while text[place:].strip():
            found = _TOKEN.match(text, place)
            if found is None:
                raise UnreadableError(text)
            self.tokens.append(found[1])
            place = found.end()
        self.variables = {token for token in self.tokens if token.isalpha() and token != "i"}

    def value(self, variables: Mapping[str, complex]) -> complex:
        """Its value where the variables have these values."""
        self.place, self.values = 0, variables
        try:
            found = self._sum()
        except (ZeroDivisionError, OverflowError, RecursionError, ValueError) as error:
            raise UnreadableError(str(error)) from error
        if self.place < len(self.tokens) or cmath.isnan(found):
            raise UnreadableError("".join(self.tokens))
        return found

    def _next(self) -> str:
        token = self.tokens[self.place] if self.place < len(self.tokens) else ""
        return _SIGNS.get(token, token)

    def _take(self) -> str:
        token = self._next()
        if not token:
            raise UnreadableError("ends too early")
        self.place += 1
        return token

    def _sum(self) -> complex:
        total = self._product()
        while self._next() in ("+", "-"):
            total += self._product() if self._take() == "+" else -self._product()
        return total

    def _product(self) -> complex:
        total, before = self._signed(), self.tokens[self.place - 1]
        while self._next() and self._next() not in ("+", "-", ")", "|"):
            if self._next() == "*":
                self._take()
                total *= self._signed()
            elif self._next() == "/":
                self._take()
                total /= self._signed()
            elif self._next() == "\\frac" and before.isdigit():  # a mixed number
                total += self._signed()
            else:
                total *= self._power()
            before = self.tokens[self.place - 1]
        return total

    def _signed(self) -> complex:
        if self._next() in ("+", "-"):
            return self._signed() if self._take() == "+" else -self._signed()
        return self._power()

    def _power(self) -> complex:
        base = self._atom()
        while self._next() in ("!", "%"):
            base = base / 100 if self._take() == "%" else complex(math.gamma(base.real + 1))
        if self._next() == "^":
            self._take()
            exponent = self._signed()
            if abs(exponent) * math.log2(max(2.0, abs(base))) > 1000:
                raise UnreadableError("too large")
            return base**exponent
        return base

    def _atom(self) -> complex:
        token = self._take()
        if token in ("(", "|"):
            inside = self._sum()
            if self._take() != (")" if token == "(" else "|"):
                raise UnreadableError("a bracket is open")
            return inside if token == "(" else complex(abs(inside))
        if token[0].isdigit() or token[0] == ".":
            return complex(float(token))
        if token.isalpha():
            return 1j if token == "i" else self.values[token]
        return self._named(token.removeprefix("\\"))

    def _named(self, name: str) -> complex:
        """A constant, function, fraction or root; arguments without braces are one digit, as LaTeX reads them."""
        if name in _NAMES:
            return complex(_NAMES[name])
        if name == "frac":
            return self._argument() / self._argument()
        if name == "sqrt":
            degree = 2 + 0j
            if self.place < len(self.tokens) and self.tokens[self.place] == "[":
                degree = self._atom()
            return self._argument() ** (1 / degree)
        if name in _FUNCTIONS:
            if self._next() == "^":
                self._take()
                exponent = self._atom()
                return _FUNCTIONS[name](self._power()) ** exponent
            return _FUNCTIONS[name](self._power())
        raise UnreadableError(name)

    def _argument(self) -> complex:
        """One argument of a command."""
        token = self._next()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.place : self.place + 1] = list(token)
        return self._atom()
