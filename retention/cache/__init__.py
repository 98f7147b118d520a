"""The evicting cache: storage, decision, trigger, ledger."""
