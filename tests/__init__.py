"""The runtime type checker of the tests: beartype, where an int is a float, as in mypy."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
