"""Evaluate gates and heuristics: python eval.py [gates=<dir> 'policies=[db_trim_kv,snapkv]' 'budgets=[10%,5%]' ...].

`python eval.py report=<dir> [<dir> ...]` evaluates nothing: it writes a run's report anew, or compares runs in one.
"""

from retention.entry import evaluate

if __name__ == "__main__":
    evaluate()
