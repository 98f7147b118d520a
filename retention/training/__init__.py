"""Lightning around gates and objectives; import the module you need."""
