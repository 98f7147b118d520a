"""Protocols, runner, statistics, pictures, report; import the module you need."""
