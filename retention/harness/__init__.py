"""Other people's evaluation harnesses over evicting caches; leaves that nobody imports."""
