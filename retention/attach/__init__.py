"""The only glue to a transformers forward."""
