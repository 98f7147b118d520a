"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654), rebuilt from their published structure in own words."""
